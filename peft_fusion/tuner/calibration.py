"""What a calibration found out, kept on the model from `calibrate` until a fusion uses it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..ffn import read_ffn
from ..fusing.statistics import FFNStatistics
from .plan import PlannedFFN

_ATTRIBUTE = "_mlp_fusion_calibration"


@dataclass(frozen=True)
class Calibration:
    """What a calibration found out about a model.

    Args:
        statistics: FFN name -> its statistics.
        checksums: FFN name -> a number that changes with its weights.
        source: where the inputs came from, in words.
    """

    statistics: dict[str, FFNStatistics]
    checksums: dict[str, float]
    source: str

    @property
    def has_gradients(self) -> bool:
        """Whether the model had gradients to take."""
        return all(statistics.fisher is not None for statistics in self.statistics.values())

    def take(self, name: str) -> FFNStatistics:
        """The statistics of an FFN, which are given away: they are freed once the FFN is fused."""
        return self.statistics.pop(name)


def keep_calibration(
    model: nn.Module, planned: Sequence[PlannedFFN], statistics: Mapping[str, FFNStatistics], source: str
) -> None:
    """Leaves what was found out about FFNs on the model, in place of an earlier calibration.

    Args:
        model: the model.
        planned: the FFNs, as they are.
        statistics: FFN name -> its statistics.
        source: where the inputs came from, in words.
    """
    setattr(model, _ATTRIBUTE, Calibration(dict(statistics), dict(_checksums(planned)), source))


def calibration_for(model: nn.Module, planned: Sequence[PlannedFFN]) -> Calibration | None:
    """The calibration that a model holds, if it is for these FFNs as they are; None if there is none.

    Raises:
        ValueError: if it is for other FFNs, or weights have changed since.
    """
    found: Calibration | None = getattr(model, _ATTRIBUTE, None)
    if found is None:
        return None
    if found.statistics.keys() != found.checksums.keys():
        raise ValueError("A fusion that did not finish has used the calibration up. Call `calibrate` again.")
    missing = [p.ffn.name for p in planned if p.ffn.name not in found.statistics]
    if missing:
        raise ValueError(
            f"The model was calibrated for the FFNs {sorted(found.statistics)[:4]}, but {missing[:4]} are to be fused "
            "as well. Call `calibrate` with the configuration that you fuse with."
        )
    for name, checksum in _checksums(planned):
        if checksum != found.checksums[name]:
            raise ValueError(
                f"The weights of the FFN {name!r} have changed since the model was calibrated. Call `calibrate` again."
            )
    return found


def drop_calibration(model: nn.Module) -> None:
    """Frees the statistics that a model holds, if any."""
    if hasattr(model, _ATTRIBUTE):
        delattr(model, _ATTRIBUTE)


def _checksums(planned: Sequence[PlannedFFN]) -> Iterator[tuple[str, float]]:
    """Of one FFN at a time: what is quantised or partitioned is whole only while it is read."""
    for p in planned:
        yield p.ffn.name, sum(float(block.sum(dtype=torch.float64)) for block in read_ffn(p.ffn).blocks())
