"""Transformers' own class of a model, and what it builds of a config: without weights, so for any size."""

from __future__ import annotations

import copy
from collections.abc import Mapping
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


def misbuilt(before: Any, values: Places, widths: Mapping[str, int]) -> str:
    """What stock code makes otherwise than wanted of a config with some values changed; "" if nothing.

    Args:
        before: the stock model, from `on_meta`, of the config as it is; not changed.
        values: what is changed in that.
        widths: FFN name -> the width that comes of it; everything else is to stay as it is.
    """
    config = copy.deepcopy(before.config)
    try:
        wrong = next((a for (p, a), v in values.items() if not reads_back(reachable(config)[p], a, v)), None)
        if wrong is not None:
            return f"`{wrong}` is another when the config is read again"
        write(config, values)
        after = on_meta(type(before), config)
    except CANNOT_BUILD as error:
        return f"{type(before).__name__} cannot be built with it ({error})"
    narrow = {ffn.name: ffn for ffn in find_all(after)}
    inside: set[str] = set()
    for ffn in find_all(before):
        inside |= set(ffn.projection_names)
        found = narrow.get(ffn.name)
        if found is None or found.width != widths.get(ffn.name, ffn.width):
            return f"it does not give the FFN {ffn.name!r} {widths.get(ffn.name, ffn.width)} neurons"
        if (found.in_dim, found.out_dim) != (ffn.in_dim, ffn.out_dim):
            return f"it says the size of what {ffn.name!r} is given or gives, too"
    shapes = {name: parameter.shape for name, parameter in after.named_parameters()}
    for name, parameter in before.named_parameters():
        if name.rpartition(".")[0] not in inside and shapes.get(name) != parameter.shape:
            return f"it says the size of `{name}`, too"
    return ""
