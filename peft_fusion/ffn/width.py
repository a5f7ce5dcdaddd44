"""Where a model's config states the width of its FFNs, so that a merged model is a stock checkpoint."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .every import AnyFFN
from .experts import GROUPED, Experts
from .layouts import EXPERTS_WIDTH_ATTRIBUTES, SHARED_WIDTH_ATTRIBUTES, WIDTH_ATTRIBUTES


@dataclass
class ConfigWidth:
    """The place in the config that states an FFN's width, and what it has to say once the FFN is narrow.

    Args:
        configs: every config object that states it (T5's encoder and decoder hold copies of the model's).
        attribute: the attribute's name; "" if no attribute states the width.
        width: the new width, or None if the FFNs under this attribute end up with different widths.
    """

    configs: list[Any]
    attribute: str
    width: int | None

    def apply(self) -> None:
        """Writes the new width, or warns that no stock checkpoint can express it."""
        if self.attribute and self.width is not None:
            for config in self.configs:
                setattr(config, self.attribute, self.width)
            return
        reason = (
            f"the FFNs governed by `config.{self.attribute}` now have different widths"
            if self.attribute
            else "its config has no attribute for the width of its FFNs"
        )
        remedy = "Keep the adapter."
        if self.attribute:
            remedy = "Write it by `peft_fusion.export(model, directory)`, keep the adapter, or fuse to one width."
        warnings.warn(
            f"The merged model works, but `save_pretrained` gives a checkpoint that stock transformers cannot "
            f"load, because {reason}. {remedy}",
            stacklevel=3,
        )


@dataclass(frozen=True)
class WidthPlace:
    """Where an FFN's width is stated: the configs, innermost first, the attribute, and of which it is a multiple."""

    configs: list[Any]
    attribute: str
    factor: int = 1

    @property
    def key(self) -> tuple[int, str]:
        """The same for all FFNs that one value governs."""
        return (id(self.configs[-1]) if self.configs else 0, self.attribute)


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
    governed = defaultdict(set)
    for ffn in ffns:
        place = places[ffn.name]
        governed[place.key].add(widths.get(ffn.name, ffn.width) / place.factor)
    result = {}
    for name in widths:
        place, values = places[name], governed[places[name].key]
        value = next(iter(values)) if len(values) == 1 else None
        whole = None if value is None or value % 1 else int(value)
        result[name] = ConfigWidth(place.configs, place.attribute, whole)
    return result


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
    return {name: steps[place.key in grouped] * place.factor for name, place in places.items()}


def width_place(model: nn.Module, ffn: AnyFFN) -> WidthPlace:
    """Where the configs from an FFN up to the model's own state its width."""
    configs = _configs_above(model, ffn.name)
    shared = any(part.startswith("shared") for part in ffn.name.split("."))
    of_experts = next((name for name in EXPERTS_WIDTH_ATTRIBUTES if any(hasattr(c, name) for c in configs)), "")
    attributes = SHARED_WIDTH_ATTRIBUTES if shared else WIDTH_ATTRIBUTES
    for attribute in EXPERTS_WIDTH_ATTRIBUTES if isinstance(ffn, Experts) else attributes:
        if attribute.startswith(("encoder_", "decoder_")) and attribute[:8] not in f".{ffn.name}.".replace(".", "_"):
            continue
        factor = _factor(configs, attribute, ffn.width) if shared and attribute == of_experts else 1
        stating = [config for config in configs if _states(config, attribute, ffn.width // factor)]
        if stating:
            return WidthPlace(stating, attribute, factor)
    return WidthPlace([], "")


def _factor(configs: Sequence[Any], attribute: str, width: int) -> int:
    """How many times the value of an attribute a width is; 1 if no config has the attribute, or it is no multiple."""
    values = (getattr(config, attribute, None) for config in configs)
    value = next((value for value in values if isinstance(value, int) and value > 0), width)
    return width // value if width % value == 0 else 1


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
