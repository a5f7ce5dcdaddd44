"""Transformers' own class of a model, and what it builds of a config: without weights, so for any size."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .every import find_all

MARK = "narrow_layers"
"""The class attribute by which a model is known that a generated modelling file has built."""

# What model classes raise for configs that they are not made for.
CANNOT_BUILD = (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError, AssertionError)

Places = Mapping[tuple[str, str], Any]
"""(path of a config within the model's, attribute) -> its value."""


def stock_class(model: nn.Module) -> type[PreTrainedModel]:
    """Transformers' own class of a model.

    Raises:
        ValueError: if it is a class of someone else's.
    """
    own = [c for c in type(model).__mro__ if c.__module__.startswith("transformers.models.")]
    if own and (own[0] is type(model) or hasattr(type(model), MARK)):
        return own[0]
    raise ValueError(
        f"{type(model).__name__} is no model class of transformers' own, so there is no stock code that its checkpoint "
        "could be loaded by. Merge it (`merge_and_unload()`) and save its state dict beside the code that builds it."
    )


def stock_config(model: Any) -> PreTrainedConfig:
    """A copy of a model's config without what an earlier export added to it."""
    config = copy.deepcopy(model.config)
    if hasattr(type(model), MARK):
        for part in reachable(config).values():
            part.per_layer_config = None
            vars(part).pop("allow_global_per_layer_attribute_access", None)
        vars(config).pop("auto_map", None)
    return config


def on_meta(kind: type[PreTrainedModel], config: PreTrainedConfig) -> Any:
    """A model without weights; some draw random numbers on the CPU all the same, which are given back."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return kind(config)


def reachable(config: PreTrainedConfig, path: str = "") -> dict[str, PreTrainedConfig]:
    """A config and those within it, by dotted path; "" for itself."""
    found = {path: config}
    for name in getattr(config, "sub_configs", ()):
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            found |= reachable(inner, f"{path}.{name}" if path else name)
    return found


def write(config: PreTrainedConfig, values: Places) -> None:
    """Writes values into a config and those within it."""
    parts = reachable(config)
    for (place, attribute), value in values.items():
        setattr(parts[place], attribute, value)


def reads_back(config: Any, attribute: str, value: Any) -> bool:
    """Whether a config that states a value says the same after it was written to a file and read."""
    if not isinstance(config, PreTrainedConfig):
        return True
    try:
        read = type(config).from_dict({**config.to_dict(), attribute: value})
    except CANNOT_BUILD:
        return False
    return bool(getattr(read, attribute, None) == value)


def misbuilt(kind: type[PreTrainedModel], config: PreTrainedConfig, values: Places, widths: Mapping[str, int]) -> str:
    """What stock code makes otherwise than wanted of a config with some values changed; "" if nothing.

    Args:
        kind: the stock class.
        config: the config as it is; not changed.
        values: what is changed in that.
        widths: FFN name -> the width that comes of it; everything else is to stay as it is.
    """
    before, config = outline(kind, config), copy.deepcopy(config)
    try:
        wrong = next((a for (p, a), v in values.items() if not reads_back(reachable(config)[p], a, v)), None)
        if wrong is not None:
            return f"`{wrong}` is another when the config is read again"
        write(config, values)
        after = outline(kind, config)
    except CANNOT_BUILD as error:
        return f"{kind.__name__} cannot be built with it ({error})"
    for name, (width, *sizes) in before.ffns.items():
        found = after.ffns.get(name)
        if found is None or found[0] != widths.get(name, width):
            return f"it does not give the FFN {name!r} {widths.get(name, width)} neurons"
        if [*found[1:]] != sizes:
            return f"it says the size of what {name!r} is given or gives, too"
    for name, shape in before.others.items():
        if after.others.get(name) != shape:
            return f"it says the size of `{name}`, too"
    return ""


@dataclass(frozen=True)
class Outline:
    """What a stock class builds of a config.

    Args:
        ffns: FFN name -> its width, and the sizes of what it is given and gives.
        others: name of a parameter that belongs to no projection of an FFN -> its shape.
    """

    ffns: Mapping[str, tuple[int, int, int]]
    others: Mapping[str, torch.Size]


def outline(kind: type[PreTrainedModel], config: PreTrainedConfig) -> Outline:
    """What a stock class builds of a config; the same question is answered once.

    Raises:
        One of `CANNOT_BUILD`: if it cannot be built without weights.
    """
    return _outline(_Question(kind, config.to_json_string(use_diff=False), config))


@dataclass(frozen=True)
class _Question:
    """A class and a config; equal where both say the same."""

    kind: type[PreTrainedModel]
    text: str
    config: PreTrainedConfig = field(compare=False)


@lru_cache(maxsize=16)
def _outline(question: _Question) -> Outline:
    built = on_meta(question.kind, copy.deepcopy(question.config))  # some classes write into their config
    ffns = find_all(built)
    inside = {name for ffn in ffns for name in ffn.projection_names}
    others = {name: p.shape for name, p in built.named_parameters() if name.rpartition(".")[0] not in inside}
    return Outline({ffn.name: (ffn.width, ffn.in_dim, ffn.out_dim) for ffn in ffns}, others)
