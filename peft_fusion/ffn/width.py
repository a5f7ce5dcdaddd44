"""Where a model's config states the width of its FFNs, so that a merged model is a stock checkpoint."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .find import FFN
from .layouts import WIDTH_ATTRIBUTES


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


def config_widths(model: nn.Module, ffns: Sequence[FFN], widths: Mapping[str, int]) -> dict[str, ConfigWidth]:
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
        configs, attribute = places[ffn.name]
        governed[(id(configs[-1]) if configs else 0, attribute)].add(widths.get(ffn.name, ffn.width))
    result = {}
    for name in widths:
        configs, attribute = places[name]
        values = governed[(id(configs[-1]) if configs else 0, attribute)]
        result[name] = ConfigWidth(configs, attribute, next(iter(values)) if len(values) == 1 else None)
    return result


def width_place(model: nn.Module, ffn: FFN) -> tuple[list[Any], str]:
    """The configs from an FFN up to the model's own that state its width, and the attribute's name; [], "" if none."""
    configs = _configs_above(model, ffn.name)
    for attribute in WIDTH_ATTRIBUTES:
        if attribute.startswith(("encoder_", "decoder_")) and attribute[:8] not in f".{ffn.name}.".replace(".", "_"):
            continue
        stating = [config for config in configs if _states(config, attribute, ffn.width)]
        if stating:
            return stating, attribute
    return [], ""


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
