"""Renews a fusion adapter that is there already: its narrow weights are written over, its parameters stay the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ffn import AnyFFN, config_widths, find_all
from ..fusing.recipe import Recipe
from ..fusing.weights import NarrowFFN
from ..observe.networks import active_narrow, carries_adapter, fusion_layers
from ..tuner.build import calibrated_projections
from ..tuner.config import FusionConfig
from ..tuner.experts import NarrowExperts
from ..tuner.layer import FusionLayer
from ..tuner.narrow import Narrow
from ..tuner.plan import AnyPlanned, planned


@dataclass(frozen=True)
class Adapter:
    """The active fusion adapter of a model.

    Args:
        name: its name.
        config: its configuration.
    """

    name: str
    config: FusionConfig

    def plan(self, host: nn.Module) -> list[AnyPlanned]:
        """The FFNs that the adapter narrows, with the widths they have.

        Raises:
            ValueError: if they hold anything but whole narrow weights.
        """
        found: dict[AnyFFN, int] = {
            ffn: self._width(ffn.projections[-1]) for ffn in find_all(host) if carries_adapter(ffn)
        }
        places = config_widths(host, list(found), {ffn.name: width for ffn, width in found.items()})
        return [planned(ffn, width, places[ffn.name]) for ffn, width in found.items()]

    def renew(self, plan: Sequence[AnyPlanned], narrow: Mapping[str, NarrowFFN], recipe: Recipe) -> None:
        """Writes narrow weights over the adapter's; if that is interrupted, all are as they were.

        Args:
            plan: as `plan` made it.
            narrow: name of a dense FFN or of an expert -> its new narrow one.
            recipe: how they were made; recorded in the configuration.
        """
        fresh: list[tuple[Narrow, Narrow]] = []
        for p in plan:
            made = calibrated_projections(narrow, p, recipe)
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

    def _narrow(self, layer: nn.Module) -> Narrow:
        assert isinstance(layer, FusionLayer)
        found = layer.mlp_fusion_narrow[self.name]
        assert isinstance(found, Narrow)
        return found

    def _width(self, out: nn.Module) -> int:
        """The width of a narrow FFN, by its out-projection or the module of its experts."""
        narrow = self._narrow(out)
        parameters = dict(narrow.named_parameters())
        sharded = [hasattr(p, "ds_id") or type(p.data) is not Tensor for p in parameters.values()]
        whole = all(tuple(p.shape) == narrow.shapes[name] for name, p in parameters.items())
        if any(sharded) or not whole:
            raise ValueError(
                f"The adapter {self.name!r} is sharded over processes, so its narrow weights cannot be written in "
                "place. Call `calibrate` before the model is sharded."
            )
        return narrow.width if isinstance(narrow, NarrowExperts) else int(parameters["weight"].shape[1])


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


def _state(module: Narrow) -> dict[str, Tensor | None]:
    """Copies of the tensors of a projection, or of experts: parameters and scales."""
    tensors = {**module._parameters, **module._buffers}
    return {name: None if tensor is None else tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def _write(module: Narrow, state: Mapping[str, Tensor | None]) -> None:
    """Writes tensors into a projection, or into experts, whose parameters stay the same objects."""
    for name, parameter in module.named_parameters():
        value = state[name]
        assert value is not None
        parameter.copy_(value)
    device = next(module.parameters()).device
    for name in module._buffers:
        scale = state[name]
        setattr(module, name, None if scale is None else scale.to(device))
