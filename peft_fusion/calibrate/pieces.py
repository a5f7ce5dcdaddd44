"""What a calibration works on one at a time: a dense FFN, or one of the experts that a layer consists of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..ffn import OneFFN, networks_of
from ..tuner.plan import AnyPlanned


@dataclass(frozen=True)
class Piece:
    """A network that becomes narrower by itself.

    Args:
        ffn: a dense FFN, or one expert.
        width: the one it is to have.
    """

    ffn: OneFFN
    width: int


def pieces_of(plan: Iterable[AnyPlanned]) -> list[Piece]:
    """Every network of a plan, in its order."""
    return [Piece(one, planned.width) for planned in plan for one in networks_of(planned.ffn)]
