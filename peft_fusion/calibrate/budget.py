"""Widths by a budget: between the FFNs of a plan and `fusing.budget`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..ffn import activation_of, read_one
from ..fusing.budget import ErrorCurve, allocate, measured_widths
from ..fusing.curves import errors_at
from ..fusing.statistics import FFNStatistics
from ..tuner.plan import AnyPlanned
from .pieces import Piece


def measured_errors(piece: Piece, statistics: FFNStatistics, multiple_of: int) -> dict[int, float]:
    """An FFN's errors at widths around the one it would have if all had the same share; none if it has no others."""
    weights = read_one(piece.ffn)
    widths = measured_widths(weights.width, piece.width / weights.width, multiple_of)
    return errors_at(weights, widths, statistics, activation_of(piece.ffn)) if widths else {}


def added_up(errors: Iterable[Mapping[int, float]]) -> dict[int, float]:
    """The errors of FFNs that have one width together, as the experts of a layer: what each adds to what they put out.

    An expert of which nothing is known, for it saw too few tokens, adds nothing.
    """
    total: dict[int, float] = {}
    for found in errors:
        for width, error in found.items():
            total[width] = total.get(width, 0.0) + error
    return total


def budgeted_widths(
    plan: Sequence[AnyPlanned], errors: Mapping[str, Mapping[int, float]], multiple_of: int
) -> dict[str, int]:
    """The widths of those FFNs that become narrower.

    Args:
        plan: with the widths that FFNs have if all have the same share: what they hold then is the budget.
        errors: FFN name -> width -> its error, that of all its experts together if it has any.
        multiple_of: what a width is a multiple of.

    Returns:
        FFN name -> width below the full one, in the plan's order; none if there is nothing to allocate.
    """
    free = [p for p in plan if errors.get(p.ffn.name)]
    if not free:
        return {}
    curves = [ErrorCurve(p.ffn.width, p.ffn.neuron_parameters, errors[p.ffn.name]) for p in free]
    budget = sum(p.ffn.neuron_parameters * p.width for p in free)
    widths = dict(zip((p.ffn.name for p in free), allocate(curves, budget, multiple_of), strict=True))
    found = {p.ffn.name: widths.get(p.ffn.name, p.width) for p in plan}
    return {p.ffn.name: found[p.ffn.name] for p in plan if found[p.ffn.name] < p.ffn.width}
