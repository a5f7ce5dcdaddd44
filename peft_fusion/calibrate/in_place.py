"""Renews a fusion adapter that is there already: its narrow weights are written over, its parameters stay the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ffn import config_widths, find_ffns
from ..fusing.recipe import Recipe
from ..fusing.weights import NarrowFFN
from ..observe.networks import active_narrow, carries_adapter, fusion_layers
from ..tuner.build import projections_of
from ..tuner.config import FusionConfig
from ..tuner.layer import FusionLayer
from ..tuner.narrow import NarrowProjection
from ..tuner.plan import PlannedFFN


@dataclass(frozen=True)
class Adapter:
    """The active fusion adapter of a model.

    Args:
        name: its name.
        config: its configuration.
    """

    name: str
    config: FusionConfig

    def plan(self, host: nn.Module) -> list[PlannedFFN]:
        """The FFNs that the adapter narrows, with the widths they have.

        Raises:
            ValueError: if they hold anything but whole narrow weights.
        """
        found = {ffn: self._width(ffn.projections[-1]) for ffn in find_ffns(host) if carries_adapter(ffn)}
        places = config_widths(host, list(found), {ffn.name: width for ffn, width in found.items()})
        return [PlannedFFN(ffn, width, places[ffn.name]) for ffn, width in found.items()]

    def renew(self, plan: Sequence[PlannedFFN], narrow: Mapping[str, NarrowFFN], recipe: Recipe) -> None:
        """Writes narrow weights over the adapter's; if that is interrupted, all are as they were.

        Args:
            plan: as `plan` made it.
            narrow: FFN name -> its new narrow FFN.
            recipe: how they were made; recorded in the configuration.
        """
        fresh: list[tuple[NarrowProjection, NarrowProjection]] = []
        for p in plan:
            made = projections_of(narrow[p.ffn.name], p, recipe)
            fresh += zip((self._narrow(layer) for layer in p.ffn.projections), made, strict=True)
        before = [(module, _state(module)) for module, _ in fresh]
        record = self.config.fused_by
        try:
            for module, made_anew in fresh:
                _write(module, _state(made_anew))
            self.config.fused_by = recipe.to_dict()
        except BaseException:
            for module, state in before:
                _write(module, state)
            self.config.fused_by = record
            raise

    def _narrow(self, layer: nn.Module) -> NarrowProjection:
        assert isinstance(layer, FusionLayer)
        found = layer.mlp_fusion_narrow[self.name]
        assert isinstance(found, NarrowProjection)
        return found

    def _width(self, out: nn.Module) -> int:
        weight = self._narrow(out).weight
        if weight.dim() != 2 or hasattr(weight, "ds_id") or type(weight.data) is not Tensor:
            raise ValueError(
                f"The adapter {self.name!r} is sharded over processes, so its narrow weights cannot be written in "
                "place. Call `calibrate` before the model is sharded."
            )
        return int(weight.shape[1])


def adapter_of(host: nn.Module) -> Adapter:
    """The fusion adapter that a model shows.

    Raises:
        ValueError: if there is none, it is merged, or it is of a kind that cannot be renewed.
    """
    layers = [layer for layer in fusion_layers(host) if active_narrow(layer) is not None]
    if not layers:
        raise ValueError(
            f"{type(host).__name__} has no active fusion adapter to renew. Pass the configuration that you will fuse "
            "with, `calibrate(model, config, dataloader)`, or call `get_peft_model` first."
        )
    if any(layer.merged for layer in layers):
        raise ValueError("The fusion adapter is merged, so that it cannot be renewed. Call `unmerge_adapter()` first.")
    name = next(n for n in layers[0].active_adapters if n in layers[0].mlp_fusion_narrow)  # type: ignore[union-attr]
    config = getattr(host, "peft_config", {}).get(name)
    if not isinstance(config, FusionConfig):
        raise ValueError(f"The adapter {name!r} has no `FusionConfig` in `peft_config`; add it by PEFT's functions.")
    return Adapter(name, config)


def _state(module: NarrowProjection) -> dict[str, Tensor | None]:
    """Copies of a projection's tensors."""
    return {
        name: None if (tensor := getattr(module, name)) is None else tensor.detach().clone()
        for name in ("weight", "bias", "scale")
    }


@torch.no_grad()
def _write(module: NarrowProjection, state: Mapping[str, Tensor | None]) -> None:
    """Writes tensors into a projection, whose parameters stay the same objects."""
    for name in ("weight", "bias"):
        if (value := state[name]) is not None:
            getattr(module, name).copy_(value)
    scale = state["scale"]
    module.scale = None if scale is None else scale.to(module.weight.device)
