"""Narrow FFNs that `calibrate` made, kept on the model until `get_peft_model` installs them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ffn import networks_of, read_all
from ..fusing.methods import find_method
from ..fusing.recipe import Recipe
from ..fusing.weights import NarrowFFN
from .plan import AnyPlanned

_ATTRIBUTE = "_mlp_fusion_calibration"
SAMPLED = (16, 256)  # rows and columns of each matrix that a fingerprint holds


@dataclass(frozen=True)
class Fingerprint:
    """What tells whether an FFN's weights are those they were, on any device and in another precision.

    Args:
        sample: some of the weights, float32 on the CPU.
        total: the sum of all, in float64.
        size: the sum of their absolute values.
        precision: of the weights' dtype.
    """

    sample: Tensor
    total: float
    size: float
    precision: float

    @classmethod
    def of(cls, planned: AnyPlanned) -> Fingerprint:
        """The fingerprint of an FFN as it is; what is quantised or partitioned is whole only while it is read."""
        blocks = [block for weights in read_all(planned.ffn) for block in weights.blocks()]
        sample = torch.cat([_some_of(block) for block in blocks])
        total = sum(float(block.sum(dtype=torch.float64)) for block in blocks)
        size = sum(float(block.abs().sum(dtype=torch.float64)) for block in blocks)
        return cls(sample.float().cpu(), total, size, torch.finfo(blocks[0].dtype).eps)

    def matches(self, other: Fingerprint) -> bool:
        """Whether both are of the same weights, as far as the coarser of their precisions shows."""
        moved = self.precision != other.precision
        tolerance = max(self.precision, other.precision) if moved else 0.0
        same = torch.allclose(self.sample, other.sample, rtol=2 * tolerance, atol=tolerance * 1e-3)
        return same and abs(self.total - other.total) <= max(tolerance, 1e-12) * self.size


def _some_of(block: Tensor) -> Tensor:
    """A few rows and columns of a matrix, in one row."""
    rows, columns = (-(-size // most) for size, most in zip(block.shape, SAMPLED, strict=True))
    return block[::rows, ::columns].flatten()


@dataclass(frozen=True)
class Calibrated:
    """What a calibration made for a model.

    Args:
        narrow: name of a dense FFN or of an expert -> its narrow one.
        fingerprints: FFN name -> what its weights were.
        asked: the recipe that was asked for, with its "auto"s.
        recipe: what it came to.
        budget: FFN name -> the width it would have if all had the same share, where a budget gave each its own; None
            where all have the width that the configuration says.
    """

    narrow: Mapping[str, NarrowFFN]
    fingerprints: Mapping[str, Fingerprint]
    asked: Recipe
    recipe: Recipe
    budget: Mapping[str, int] | None = None

    def width_of(self, planned: AnyPlanned) -> int | None:
        """The width that an FFN was given; None if it was not calibrated. All experts of a layer have the same."""
        found = self.narrow.get(networks_of(planned.ffn)[0].name)
        return None if found is None else found.weights.width


def hand_over(model: nn.Module, calibrated: Calibrated) -> None:
    """Leaves narrow FFNs on a model, in place of those of an earlier calibration."""
    setattr(model, _ATTRIBUTE, calibrated)


def handed_over(model: nn.Module) -> Calibrated | None:
    """What a calibration left on a model, if anything."""
    found: Calibrated | None = getattr(model, _ATTRIBUTE, None)
    return found


def allocated_widths(model: nn.Module, planned: Sequence[AnyPlanned]) -> dict[str, int]:
    """The widths that a calibration allocated: FFN name -> width, of those that became narrower.

    Args:
        model: the calibrated model.
        planned: the FFNs with the widths they would have if all had the same share.

    Raises:
        ValueError: if none were allocated, or of other FFNs or for another share.
    """
    found = handed_over(model)
    if found is None or found.budget is None:
        raise ValueError(
            '`allocation="fisher"` decides widths by what goes through the FFNs: call `calibrate(model, config, '
            "dataloader)` with this configuration first. Widths that were decided before are in a saved "
            "configuration's `fused_widths`; give them as `width_pattern`."
        )
    asked = {p.ffn.name: p.width for p in planned}
    if asked != found.budget:
        differing = [name for name in {**asked, **found.budget} if asked.get(name) != found.budget.get(name)][:4]
        raise ValueError(
            f"The model was calibrated for another budget: the FFNs {differing} were to have "
            f"{[found.budget.get(name) for name in differing]} neurons on average, but the configuration asks for "
            f"{[asked.get(name) for name in differing]}. Call `calibrate` with the configuration that you fuse with."
        )
    widths = {p.ffn.name: found.width_of(p) for p in planned}
    return {name: width for name, width in widths.items() if width is not None}


def drop_calibrated(model: nn.Module) -> None:
    """Frees the narrow FFNs that a model holds for `get_peft_model`, if any."""
    if hasattr(model, _ATTRIBUTE):
        delattr(model, _ATTRIBUTE)


def calibrated_for(model: nn.Module, planned: Sequence[AnyPlanned], asked: Recipe) -> Calibrated | None:
    """The narrow FFNs that a calibration made for just this; None if the model was not calibrated.

    Raises:
        ValueError: if they are of other FFNs, of other widths, by other settings, or the weights have changed since.
    """
    found = handed_over(model)
    if found is None:
        return None
    if not find_method(asked.method).calibrated:
        warnings.warn(f'`method="{asked.method}"` makes no use of the calibration that the model has.', stacklevel=2)
        return None
    again = "Call `calibrate` with the configuration that you fuse with."
    missing = [p.ffn.name for p in planned if found.width_of(p) is None]
    if missing:
        raise ValueError(
            f"The model was calibrated for the FFNs {sorted(found.narrow)[:4]}, but {missing[:4]} are to be fused as "
            f"well. {again}"
        )
    for p in planned:
        if found.width_of(p) != p.width:
            raise ValueError(
                f"Calibration made the FFN {p.ffn.name!r} {found.width_of(p)} neurons wide, but the configuration asks "
                f"for {p.width}. {again}"
            )
    differing = {k: v for k, v in vars(asked).items() if v != getattr(found.asked, k)}
    differing = {k: v for k, v in differing.items() if v != getattr(found.recipe, k)}  # "auto" came to what is asked
    if differing:
        made = {name: getattr(found.recipe, name) for name in differing}
        raise ValueError(f"The model was calibrated with {made}, but the configuration asks for {differing}. {again}")
    for p in planned:
        if not found.fingerprints[p.ffn.name].matches(Fingerprint.of(p)):
            raise ValueError(
                f"The weights of the FFN {p.ffn.name!r} have changed since the model was calibrated. Call `calibrate` "
                "again."
            )
    return found
