"""Where a model's config states the width of its FFNs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from .every import AnyFFN
from .experts import GROUPED, Experts
from .layouts import (
    EXPERTS_WIDTH_ATTRIBUTES,
    MULTIPLE_ATTRIBUTES,
    PARTS,
    SHARED_COUNTS,
    SHARED_WIDTH_ATTRIBUTES,
    TAKEN_AT_ITS_WORD,
    WIDTH_ATTRIBUTES,
)
from .stock import reachable


@dataclass(frozen=True)
class WidthPlace:
    """Where an FFN's width is stated: the configs, innermost first, the attribute, and of which it is a multiple.

    Args:
        configs: every config object that states it; empty if none does.
        attribute: the attribute's name; "" if none states it.
        factor: of which the width is the attribute's multiple.
        whole: whether the attribute holds whole numbers only.
        layer: which entry, where the attribute is a list (Gemma 3n).
        also: further attributes that a change of it takes, and their values.
    """

    configs: list[Any]
    attribute: str
    factor: float = 1
    whole: bool = True
    layer: int | None = None
    also: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> tuple[int, str]:
        """The same for all FFNs that one value governs."""
        return (id(self.configs[-1]) if self.configs else 0, self.attribute)


def stated_value(wanted: Sequence[tuple[WidthPlace, int]]) -> Any | None:
    """What the attribute in one place has to say for the FFNs that it governs; None if nothing serves them all.

    Args:
        wanted: for each of these FFNs, the place, and the width that it is to have.
    """
    first, _ = wanted[0]
    if first.layer is not None:
        values = list(getattr(first.configs[0], first.attribute))
        for place, width in wanted:
            values[place.layer or 0] = width
        return values
    several = {width / place.factor for place, width in wanted}
    value = several.pop()
    if several or (first.whole and value % 1):
        return None
    return int(value) if first.whole else value


def width_steps(model: nn.Module, ffns: Sequence[AnyFFN], multiple_of: int) -> dict[str, int]:
    """What each FFN's width, where it comes from a ratio, is a multiple of.

    That of experts is one of `GROUPED`, too, and what is stated in one place with theirs is rounded as they are.

    Args:
        model: the model.
        ffns: all of its FFNs.
        multiple_of: what all of them are to be multiples of.
    """
    places = {ffn.name: width_place(model, ffn) for ffn in ffns}
    grouped = {places[ffn.name].key for ffn in ffns if isinstance(ffn, Experts)}
    steps = {True: math.lcm(multiple_of, GROUPED), False: multiple_of}
    shared = {name: int(place.factor) for name, place in places.items() if place.attribute in SHARED_WIDTH_ATTRIBUTES}
    return {name: steps[place.key in grouped] * max(1, shared.get(name, 1)) for name, place in places.items()}


def width_place(model: nn.Module, ffn: AnyFFN) -> WidthPlace:
    """Where the configs from an FFN up to the model's own state its width, as far as names and values tell."""
    configs = _configs_above(model, ffn.name)
    shared = any(part.startswith("shared") for part in ffn.name.split("."))
    dense = SHARED_WIDTH_ATTRIBUTES if shared else WIDTH_ATTRIBUTES
    known = EXPERTS_WIDTH_ATTRIBUTES if isinstance(ffn, Experts) else dense
    attributes = [attribute for attribute in known if _is_about(attribute, ffn.name)]
    layer = _layer(ffn.name)
    for attribute in attributes:
        factor = _factor(configs, attribute, ffn.width) if shared else 1
        if stating := [config for config in configs if _states(config, attribute, ffn.width // factor)]:
            return WidthPlace(_own(model, stating), attribute, factor)
        if stating := [c for c in configs if _entry(getattr(c, attribute, None), layer) == ffn.width]:
            return WidthPlace(_own(model, stating), attribute, layer=layer)
    return WidthPlace([], "") if isinstance(ffn, Experts) else _indirect(model, ffn, configs, attributes)


def _indirect(model: nn.Module, ffn: AnyFFN, configs: list[Any], attributes: Sequence[str]) -> WidthPlace:
    """Where a width is stated that is not itself an attribute's value; a guess, if there is no multiple."""
    for attribute in (name for name in MULTIPLE_ATTRIBUTES if _is_about(name, ffn.name)):
        values = [(config, getattr(config, attribute, None)) for config in configs]
        stating = [c for c, value in values if isinstance(value, (int, float)) and value * ffn.in_dim == ffn.width]
        if stating:
            whole = isinstance(getattr(stating[0], attribute), int)
            return WidthPlace(_own(model, stating), attribute, ffn.in_dim, whole)
    for attribute in attributes:
        if stating := [config for config in configs if getattr(config, attribute, 0) == 2 * ffn.width]:
            return WidthPlace(_own(model, stating), attribute, 0.5)
        for switch, off in TAKEN_AT_ITS_WORD.items():
            if stating := [c for c in configs if getattr(c, switch, off) != off and hasattr(c, attribute)]:
                return WidthPlace(_own(model, stating), attribute, also=((switch, off),))
    return WidthPlace([], "")


def _entry(value: Any, layer: int | None) -> int | None:
    """The entry of a list that belongs to a layer."""
    return value[layer] if layer is not None and isinstance(value, (list, tuple)) and layer < len(value) else None


def _layer(name: str) -> int | None:
    """The number of the layer that an FFN is in: the first number of its path."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _own(model: nn.Module, configs: list[Any]) -> list[Any]:
    """Configs, innermost first, up to one that the model's config holds: those further up say nothing of its part.

    T5's stacks have copies, which it does not hold, and which are to be kept equal.
    """
    known = getattr(model, "config", None)
    held = list(reachable(known).values()) if isinstance(known, PreTrainedConfig) else []
    end = next((i for i, config in enumerate(configs, 1) if any(config is one for one in held)), len(configs))
    return configs[:end]


def _is_about(attribute: str, name: str) -> bool:
    """Whether an attribute that says of which part of a model it is (`decoder_ffn_dim`) says it of an FFN's."""
    return all(part in name for part in attribute.split("_") if part in PARTS)


def _factor(configs: Sequence[Any], attribute: str, width: int) -> int:
    """How many times the value of an attribute the width of shared experts is; 1 if it is no multiple."""
    values = (getattr(config, attribute, None) for config in configs)
    value = next((value for value in values if isinstance(value, int) and value > 0), width)
    counts = [getattr(config, name, None) for config in configs for name in SHARED_COUNTS]
    return width // value if width % value == 0 and width // value in counts else 1


def _configs_above(model: nn.Module, name: str) -> list[Any]:
    """The distinct configs of the modules from an FFN up to the model, innermost first."""
    configs: list[Any] = []
    path = name.split(".") if name else []
    for depth in range(len(path), -1, -1):
        config = getattr(model.get_submodule(".".join(path[:depth])), "config", None)
        if config is not None and not any(config is known for known in configs):
            configs.append(config)
    return configs


def _states(config: Any, attribute: str, width: int) -> bool:
    """Whether a config's attribute is this width (GPT-2's `n_inner=None` means four times the hidden size)."""
    value = getattr(config, attribute, 0)
    if attribute == "n_inner" and value is None:
        return width == 4 * config.hidden_size
    return bool(value == width)
