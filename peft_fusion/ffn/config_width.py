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
from .stock import CANNOT_BUILD, misbuilt, on_meta, reachable, reads_back, stock_class, stock_config
from .width import WidthPlace, width_place

KEEP = "Keep the adapter."
NONE_STATED = "its config has no attribute for the width of its FFNs"


@dataclass
class ConfigWidth:
    """The place in the config that states an FFN's width, and what it has to say once the FFN is narrow.

    Args:
        configs: every config object that states it (T5's encoder and decoder hold copies of the model's).
        attribute: the attribute's name; "" if no attribute states the width.
        width: what it says then: the width, or a multiple; None if no value gives what is wanted.
        problem: why none does.
    """

    configs: list[Any]
    attribute: str
    width: float | None
    problem: str = ""

    @property
    def states_it(self) -> bool:
        """Whether a config can state it so that stock transformers builds the narrow model."""
        return bool(self.attribute) and self.width is not None

    def apply(self) -> None:
        """Writes the new width, or warns that no stock checkpoint can express it."""
        if self.states_it:
            for config in self.configs:
                setattr(config, self.attribute, self.width)
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
    result: dict[str, ConfigWidth] = {}
    for alike in governed.values():
        place = places[alike[0].name]
        wanted = {ffn.name: widths.get(ffn.name, ffn.width) for ffn in alike}
        value = place.value({wanted[ffn.name] / places[ffn.name].factor for ffn in alike})
        problem = _problem(model, alike, place, value, wanted)
        one = ConfigWidth(place.configs, place.attribute, None if problem else value, problem)
        result |= {ffn.name: one for ffn in alike if ffn.name in widths}
    return result


def _problem(
    model: nn.Module, alike: Sequence[AnyFFN], place: WidthPlace, value: float | None, wanted: Mapping[str, int]
) -> str:
    """Why a config cannot state the widths of FFNs that are stated in one place, and what to do; "" if it can."""
    if not place.attribute:
        return ""
    if value is None and len(set(wanted.values())) > 1:
        return (
            f"the FFNs governed by `config.{place.attribute}` now have different widths. Write it by "
            "`peft_fusion.export(model, directory)`, keep the adapter, or fuse to one width."
        )
    if value is None:
        return f"`config.{place.attribute}` states whole multiples of {place.factor} only. {KEEP}"
    if wanted == {ffn.name: ffn.width for ffn in alike}:
        return ""
    if not all(reads_back(config, place.attribute, value) for config in place.configs):
        return f"`config.{place.attribute}` is another when it is read again. {KEEP}"
    found = _tried(model, place, value, wanted) if _says_more(model, alike) else ""
    return f"of `config.{place.attribute}`: {found}. {KEEP}" if found else ""


def _says_more(model: nn.Module, alike: Sequence[AnyFFN]) -> bool:
    """Whether something else in the model has a size that may come from what states the width of FFNs."""
    inside = {id(p) for ffn in alike for module in ffn.base_projections for p in module.parameters()}
    sizes = {size for ffn in alike for size in (ffn.width, 2 * ffn.width)}
    others = (getattr(p, "ds_shape", p.shape) for p in model.parameters() if id(p) not in inside)
    return len({ffn.width for ffn in alike}) > 1 or any(sizes & set(shape) for shape in others if len(shape) > 1)


def _tried(model: nn.Module, place: WidthPlace, value: float, wanted: Mapping[str, int]) -> str:
    """What stock code makes otherwise than wanted of the value; "" if nothing, or that cannot be tried."""
    if not isinstance(model, PreTrainedModel):
        return ""
    paths = [path for path, c in reachable(model.config).items() if any(c is one for one in place.configs)]
    try:
        before = on_meta(stock_class(model), stock_config(model))
    except CANNOT_BUILD:
        return ""
    return misbuilt(before, {(path, place.attribute): value for path in paths}, wanted) if paths else ""
