"""How an FFN's error grows as its neurons go, in units in which FFNs can be compared."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from .activations import Activation
from .held_out import HeldOut
from .known import KnownFFN, known_ffn
from .neurons import eliminations
from .precision import exact_products
from .refit import Problem, Refit, refit, with_fit
from .rows import select_rows
from .statistics import FFNStatistics
from .weights import FFNWeights, NarrowFFN, cast


@dataclass(frozen=True)
class Eliminated:
    """What is left of an FFN as its neurons go.

    Args:
        errors: width -> the error there.
        narrow: width -> the FFN of that width, its out-projection fitted anew; those that were asked for.
    """

    errors: dict[int, float]
    narrow: dict[int, NarrowFFN]


def eliminated(
    weights: FFNWeights,
    widths: Collection[int],
    statistics: FFNStatistics,
    activation: Activation,
    kept: Collection[int] = (),
) -> Eliminated:
    """An FFN of which only some neurons are left, their out-projection fitted anew, at several widths.

    One elimination runs through all of the widths. The error is E<e, F e> over held-out tokens with the Fisher
    information F: twice the change of the model's predictions that this FFN alone makes, to second order. It can be
    compared between FFNs, for which the metric's size must be kept (`metric.metric` sets it to 1).

    Memory: about four times 4 * neurons ** 2 bytes beyond the statistics and what is kept.

    Args:
        weights: the FFN's weights.
        widths: below the full one.
        statistics: what calibration found out about it, with the Fisher information.
        activation: its activation function.
        kept: those of the widths at which the narrow FFN itself is wanted, not only its error.

    Raises:
        ValueError: if the statistics are of an FFN of another shape, or hold no gradients.
    """
    with exact_products(weights.out_weight.device):
        known = known_ffn(weights, statistics, activation, with_metric=True)
        held_out = known.held_out(weights)
        size = held_out.size * _metric_size(statistics)
        found = Eliminated({}, {})
        rounds = _rounds(weights.width, widths)
        for left in eliminations(known.second_moment(), known.seen_weight, rounds):
            if len(left) in widths:
                fit = _refitted(known, left, held_out)
                found.errors[len(left)] = size * fit.error
                if len(left) in kept:
                    found.narrow[len(left)] = _narrow(known, left, fit)
    return found


def _refitted(known: KnownFFN, left: Tensor, held_out: HeldOut) -> Refit:
    """The out-projection of some of the neurons, chosen on held-out tokens, of which all neurons are given."""
    return refit(Problem(known.moments_of_kept(left), known.seen_weight[left], held_out.of_neurons(left)))


def _narrow(known: KnownFFN, left: Tensor, fit: Refit) -> NarrowFFN:
    narrow = with_fit(cast(select_rows(known.weights, left), known.dtype), fit, known.metric_root)
    return NarrowFFN(cast(narrow, known.weights.out_weight.dtype), narrow.out_weight.new_ones(narrow.width).float())


def _metric_size(statistics: FFNStatistics) -> float:
    """What `metric` divides the Fisher information by."""
    assert statistics.fisher is not None  # as `known_ffn` requires
    return float(statistics.fisher.diagonal().double().mean())


def _rounds(full: int, widths: Collection[int]) -> list[int]:
    """How many neurons are left after each round of an elimination: at every width, and a tenth less at a time."""
    counts: list[int] = []
    for width in sorted(widths, reverse=True):
        before = counts[-1] if counts else full
        while (before := round(0.9 * before)) > width:
            counts.append(before)
        counts.append(width)
    return counts
