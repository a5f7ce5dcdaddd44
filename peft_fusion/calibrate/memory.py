"""What a calibration holds beyond the model and its narrow FFNs, and how many FFNs a bound on that lets in a group.

Counted are the tensors of the group and of the one FFN that is being made; not the activations of the passes, which are
those of one layer over a batch, and over `MOST_LENGTH` tokens their graph.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..ffn import AnyFFN, OneFFN, like_of, networks_of
from ..fusing.statistics import SAMPLE_TOKENS
from .scales import MOST_TOKENS

MATRICES = 3.5
"""Float32 matrices of neurons x neurons that making a narrow FFN takes at most (`tests/fusing/test_memory.py`)."""


def held(ffn: AnyFFN) -> int:
    """Bytes that an FFN of a group takes: its statistics with the Fisher information, later inputs and gradients.

    Every expert of a layer has its own.
    """
    return sum(map(_held_of_one, networks_of(ffn)))


def _held_of_one(one: OneFFN) -> int:
    size = like_of(one).element_size()
    statistics = 4 * (one.width**2 + one.out_dim**2) + size * SAMPLE_TOKENS * one.in_dim
    return max(statistics, 2 * size * MOST_TOKENS * (one.in_dim + one.out_dim))


def making(ffn: AnyFFN) -> int:
    """Bytes that making one narrow FFN takes beyond its statistics: matrices, and its projections in float32."""
    return int(4 * (MATRICES * ffn.width**2 + 3 * ffn.width * max(ffn.in_dim, ffn.out_dim)))


def bound(ffns: Iterable[AnyFFN], size: int) -> int:
    """Bytes that a calibration in groups of so many FFNs takes at most."""
    ffns = sorted(ffns, key=held, reverse=True)
    return sum(map(held, ffns[:size])) + max(map(making, ffns), default=0)


def most_at_once(ffns: Iterable[AnyFFN], memory: int) -> int:
    """How many FFNs to work on at once.

    Args:
        ffns: those to narrow.
        memory: bytes that may be taken beyond the model, its narrow FFNs and the activations of the passes.

    Returns:
        The largest number that keeps within it.

    Raises:
        ValueError: if one FFN takes more, saying how much.
    """
    ffns = list(ffns)
    if ffns and (needed := bound(ffns, 1)) > memory:
        raise ValueError(
            f"`memory` of {memory:,} bytes does not suffice for one FFN at a time, which takes {needed:,}."
        )
    return max((size for size in range(1, len(ffns) + 1) if bound(ffns, size) <= memory), default=1)
