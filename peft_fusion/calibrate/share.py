"""Shares the work on FFNs among the ranks: each makes some of the narrow FFNs, and all get all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ffn import device_of
from ..fusing.curves import Eliminated
from ..fusing.weights import FFNWeights, NarrowFFN
from ..observe import ranks
from ..progress import progress
from .pieces import Piece


def share_results(group: Sequence[Piece], make: Callable[[Piece], NarrowFFN], description: str) -> dict[str, NarrowFFN]:
    """Makes every FFN's narrow one on one of the ranks, and sends it to the others.

    Args:
        group: the FFNs, dense ones and experts.
        make: makes a narrow FFN; called for this rank's FFNs only.
        description: of the work, for the progress bar.

    Returns:
        Name -> its narrow FFN, the same bits on every rank.
    """
    own = ranks.together(lambda: {p.ffn.name: make(p) for p in progress(ranks.own(group), description)})
    return {p.ffn.name: _sent(own.get(p.ffn.name), ranks.owner(i), p) for i, p in enumerate(group)}


def share_numbers(
    group: Sequence[Piece], find: Callable[[Piece], list[float]], description: str
) -> dict[str, list[float]]:
    """Finds some numbers of every FFN on one of the ranks, and tells the others; args as of `share_results`."""
    own = ranks.together(lambda: {p.ffn.name: find(p) for p in progress(ranks.own(group), description)})
    return {p.ffn.name: ranks.object_from_rank(ranks.owner(i), own.get(p.ffn.name, [])) for i, p in enumerate(group)}


def share_measured(group: Sequence[Piece], measure: Callable[[Piece], Eliminated]) -> dict[str, Eliminated]:
    """Measures every FFN's errors on one of the ranks, and sends them and the narrow FFNs that were kept to the others.

    Args:
        group: the FFNs, dense ones and experts.
        measure: what `eliminated` finds out about an FFN, with one narrow one; called for this rank's FFNs only.

    Returns:
        Name -> what was found, the same on every rank.
    """
    own = ranks.together(lambda: {p.ffn.name: measure(p) for p in progress(ranks.own(group), "Measuring widths")})
    found = {}
    for i, p in enumerate(group):
        mine = own.get(p.ffn.name)
        errors = ranks.object_from_rank(ranks.owner(i), mine.errors if mine else {})
        narrow = _sent(next(iter(mine.narrow.values())) if mine else None, ranks.owner(i), p)
        found[p.ffn.name] = Eliminated(errors, {narrow.weights.width: narrow})
    return found


def _sent(narrow: NarrowFFN | None, owner: int, p: Piece) -> NarrowFFN:
    """A narrow FFN that one rank has made, on all."""
    if ranks.world() == 1:
        assert narrow is not None
        return narrow
    tensors = [] if narrow is None else _tensors(narrow)
    kinds = ranks.object_from_rank(owner, [None if t is None else (t.shape, t.dtype) for t in tensors])
    if narrow is None:
        device = device_of(p.ffn)
        tensors = [None if kind is None else torch.empty(kind[0], dtype=kind[1], device=device) for kind in kinds]
    received = iter(ranks.from_rank(owner, [t for t in tensors if t is not None]))
    return _assembled([None if t is None else next(received) for t in tensors])


def _tensors(narrow: NarrowFFN) -> list[Tensor | None]:
    """Its tensors in a fixed order: in-weights and in-biases, out-weight and bias, scale, in-scales if any."""
    w = narrow.weights
    return [*w.in_weights, *w.in_biases, w.out_weight, w.out_bias, narrow.scale, *(narrow.in_scales or ())]


def _assembled(tensors: list[Tensor | None]) -> NarrowFFN:
    """The inverse of `_tensors`: plain FFNs have 5 or 6 tensors, gated ones 7 or 9."""
    ins = 1 if len(tensors) < 7 else 2
    weights = FFNWeights(tuple(tensors[:ins]), tuple(tensors[ins : 2 * ins]), *tensors[2 * ins : 2 * ins + 2])  # type: ignore[arg-type]
    scale, *in_scales = tensors[2 * ins + 2 :]
    assert scale is not None
    return NarrowFFN(weights, scale, tuple(in_scales) or None)  # type: ignore[arg-type]
