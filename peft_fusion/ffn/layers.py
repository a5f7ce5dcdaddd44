"""The lists of layers of a model, and whether their layers can be built one by one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

PLAIN = (bool, int, float, str, tuple, type(None))
NUMBERED = ("layer_idx", "layer_id", "layer_index", "layer_number", "idx")


@dataclass(frozen=True)
class LayerList:
    """Layers that can be built one by one.

    Args:
        path: of their `nn.ModuleList` in the model.
        owner: path of the module that holds the list and has the config which they are built from.
        index: the argument by which their class takes a layer's number; "" if it takes none.
    """

    path: str
    owner: str
    index: str


def layer_of(model: nn.Module, name: str, layers: int | None) -> tuple[LayerList, int] | None:
    """The layer that an FFN is in, or is: its list, which has so many layers, and its number there."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        path = ".".join(parts[:depth])
        held = model.get_submodule(path)
        if isinstance(held, nn.ModuleList) and len(held) == layers:
            above = [".".join(parts[:d]) for d in range(depth - 1, -1, -1)]
            owner = next(one for one in above if hasattr(model.get_submodule(one), "config"))
            arguments = inspect.signature(type(held[int(parts[depth])])).parameters
            index = next((one for one in NUMBERED if one in arguments), "")
            return LayerList(path, owner, index), int(parts[depth])
    return None


def why_not_rebuilt(model: Any, layer_list: LayerList, number: int) -> str | None:
    """Why a layer's class, called with a config (and its number), does not give what the model has there, if so."""
    layer = model.get_submodule(layer_list.path)[number]
    config = model.get_submodule(layer_list.owner).config
    call = f"{type(layer).__name__}(config{', ' + layer_list.index + '=' + str(number) if layer_list.index else ''})"
    try:
        with torch.device("meta"):
            made = type(layer)(config, **({layer_list.index: number} if layer_list.index else {}))
    except (TypeError, AttributeError) as error:
        return f"`{call}` cannot be called ({error})"
    for (name, said), (_, told) in zip(_description(made), _description(layer), strict=False):
        if said != told:
            return f"`{call}` is not the layer that the model has at `{layer_list.path}.{number}` (see its `{name}`)"
    same = len(list(made.modules())) == len(list(layer.modules()))
    return None if same else f"`{call}` has other parts than the layer at `{layer_list.path}.{number}`"


def _description(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a layer consists of, part by part: classes, shapes and plain settings."""
    for name, module in layer.named_modules():
        shapes = {key: tuple(p.shape) for key, p in module.named_parameters(recurse=False)}
        settings = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, PLAIN)
            and not key.startswith("_")
            and key not in ("training", "gradient_checkpointing")
        }
        yield name or "class", (name, type(module), shapes, settings)
