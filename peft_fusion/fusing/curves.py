"""How an FFN's error grows as its neurons go, in units in which FFNs can be compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .activations import Activation
from .known import KnownFFN, known_ffn
from .moments import SampleMoments
from .neurons import eliminations
from .precision import exact_products
from .refit import refit
from .statistics import FFNStatistics
from .weights import FFNWeights


def errors_at(
    weights: FFNWeights, widths: Sequence[int], statistics: FFNStatistics, activation: Activation
) -> dict[int, float]:
    """The error of an FFN of which only some neurons are left, their out-projection fitted anew, at several widths.

    One elimination runs through all of the widths. The error is E<e, F e> over held-out tokens with the Fisher
    information F: twice the change of the model's predictions that this FFN alone makes, to second order. It can be
    compared between FFNs, for which the metric's size must be kept (`metric.metric` sets it to 1).

    Memory: about four times 4 * neurons ** 2 bytes beyond the statistics.

    Args:
        weights: the FFN's weights.
        widths: below the full one.
        statistics: what calibration found out about it, with the Fisher information.
        activation: its activation function.

    Returns:
        Width -> error, for all widths.

    Raises:
        ValueError: if the statistics are of an FFN of another shape, or hold no gradients.
    """
    with exact_products(weights.out_weight.device):
        known = known_ffn(weights, statistics, activation, with_metric=True)
        held_out = known.held_out_moments(weights)
        size = (held_out.power + float(held_out.mean_out.square().sum())) * _metric_size(statistics)
        rounds = _rounds(weights.width, widths)
        found = {}
        for kept in eliminations(known.second_moment(), known.seen_weight, rounds):
            if len(kept) in widths:
                found[len(kept)] = size * _refitted_error(known, kept, held_out)
    return found


def _refitted_error(known: KnownFFN, kept: torch.Tensor, held_out: SampleMoments) -> float:
    """The relative error of some of the neurons on held-out tokens."""
    gram, cross, mean = held_out.gram[kept][:, kept], held_out.cross[kept], held_out.mean[kept]
    of_kept = SampleMoments(gram, cross, mean, held_out.mean_out, held_out.power)
    return refit(known.moments_of_kept(kept), known.seen_weight[kept], of_kept).error


def _metric_size(statistics: FFNStatistics) -> float:
    """What `metric` divides the Fisher information by."""
    assert statistics.fisher is not None  # as `known_ffn` requires
    return float(statistics.fisher.diagonal().double().mean())


def _rounds(full: int, widths: Sequence[int]) -> list[int]:
    """How many neurons are left after each round of an elimination: at every width, and a tenth less at a time."""
    counts: list[int] = []
    for width in sorted(widths, reverse=True):
        before = counts[-1] if counts else full
        while (before := round(0.9 * before)) > width:
            counts.append(before)
        counts.append(width)
    return counts
