"""What a model's config has to say once FFNs are narrow, so that the merged model is a stock checkpoint."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .every import AnyFFN
from .stock import CANNOT_BUILD, misbuilt, outline, reachable, stock_class, stock_config
from .width import WidthPlace, stated_value, width_place

KEEP = "Keep the adapter."
NONE_STATED = "its config has no attribute for the width of its FFNs"


@dataclass
class ConfigWidth:
    """The place in the config that states an FFN's width, and what it has to say once the FFN is narrow.

    Args:
        configs: every config object that states it (T5's encoder and decoder hold copies of the model's).
        attribute: the attribute's name; "" if no attribute states the width.
        width: what it says then: the width, a multiple, or a list; None if no value gives what is wanted.
        problem: why none does.
        also: further attributes that this takes, and their values.
    """

    configs: list[Any]
    attribute: str
    width: Any | None
    problem: str = ""
    also: tuple[tuple[str, Any], ...] = ()

    @property
    def states_it(self) -> bool:
        """Whether a config can state it so that stock transformers builds the narrow model."""
        return bool(self.attribute) and self.width is not None

    def apply(self) -> None:
        """Writes the new width, or warns that no stock checkpoint can express it."""
        if self.states_it:
            for config in self.configs:
                for attribute, value in ((self.attribute, self.width), *self.also):
                    setattr(config, attribute, value)
            return
        warnings.warn(
            f"The merged model works, but `save_pretrained` gives a checkpoint that stock transformers cannot "
            f"load, because {self.problem or NONE_STATED + '. ' + KEEP}",
            stacklevel=3,
        )


def config_widths(model: nn.Module, ffns: Sequence[AnyFFN], widths: Mapping[str, int]) -> dict[str, ConfigWidth]:
    """For each FFN to fuse, the place that states its width.

    Args:
        model: the model.
        ffns: all of its FFNs, fused or not.
        widths: FFN name -> narrow width, for those to fuse.

    Returns:
        FFN name -> `ConfigWidth`, for those to fuse.
    """
    places = {ffn.name: width_place(model, ffn) for ffn in ffns}
    governed: dict[tuple[int, str], list[AnyFFN]] = defaultdict(list)
    for ffn in ffns:
        governed[places[ffn.name].key].append(ffn)
    found: list[tuple[list[AnyFFN], ConfigWidth]] = []
    for alike in governed.values():
        wanted = [(places[ffn.name], widths.get(ffn.name, ffn.width)) for ffn in alike]
        place, value = wanted[0][0], stated_value(wanted)
        problem = "" if value is not None or not place.attribute else _no_value(place, [width for _, width in wanted])
        found.append((alike, ConfigWidth(place.configs, place.attribute, value, problem, place.also)))
    _try(model, found, widths)
    return {ffn.name: one for alike, one in found for ffn in alike if ffn.name in widths}


def _no_value(place: WidthPlace, wanted: Sequence[int]) -> str:
    """Why no value of an attribute gives the widths that are wanted, and what to do."""
    if len(set(wanted)) > 1:
        return (
            f"the FFNs governed by `config.{place.attribute}` now have different widths. Write it by "
            "`peft_fusion.export(model, directory)`, keep the adapter, or fuse to one width."
        )
    return f"`config.{place.attribute}` states whole multiples of {place.factor} only. {KEEP}"


def _try(model: nn.Module, found: Sequence[tuple[list[AnyFFN], ConfigWidth]], widths: Mapping[str, int]) -> None:
    """Notes the problems of values of which stock code, on the meta device, builds something else than is wanted."""
    changed = [
        (alike, one)
        for alike, one in found
        if one.states_it and any(widths.get(ffn.name, ffn.width) != ffn.width for ffn in alike)
    ]
    if not changed or not isinstance(model, PreTrainedModel):
        return
    try:
        outline(stock_class(model), stock_config(model))
    except CANNOT_BUILD:
        return
    if not _misbuilt(model, changed, widths):
        return
    for alike, one in changed:
        problem = _misbuilt(model, [(alike, one)], widths)
        if problem or len(changed) == 1:
            one.width, one.problem = None, f"of `config.{one.attribute}`: {problem}. {KEEP}"


def _misbuilt(
    model: PreTrainedModel, changed: Sequence[tuple[list[AnyFFN], ConfigWidth]], widths: Mapping[str, int]
) -> str:
    """What stock code makes otherwise than wanted of the config with these changes."""
    parts = reachable(model.config)
    values = {
        (path, attribute): value
        for _, one in changed
        for path, part in parts.items()
        if any(part is config for config in one.configs)
        for attribute, value in ((one.attribute, one.width), *one.also)
    }
    wanted = {ffn.name: widths.get(ffn.name, ffn.width) for alike, _ in changed for ffn in alike}
    return misbuilt(stock_class(model), stock_config(model), values, wanted)
