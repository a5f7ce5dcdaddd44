"""Widths by a budget: between the FFNs of a plan and `fusing.budget`.

statistics -> error curves, and an FFN of the width that all have alike   (`measured`)
all of these in place -> how much each contributes                        (`attribution.contributions`)
curves at these sizes -> widths                                           (`budgeted_widths`)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..ffn import activation_of, read_one
from ..fusing.budget import ErrorCurve, allocate, in_company, measured_widths
from ..fusing.curves import Eliminated, eliminated
from ..fusing.statistics import FFNStatistics
from ..tuner.plan import AnyPlanned
from .pieces import Piece


def measured(piece: Piece, statistics: FFNStatistics, multiple_of: int, fixed: bool) -> Eliminated:
    """An FFN's errors at some widths, and a narrow one of the width that it would have if all had the same share.

    Args:
        piece: with that width.
        statistics: of it, with the Fisher information.
        multiple_of: what a width is a multiple of.
        fixed: whether it keeps the width it is planned with: then no other is measured.
    """
    weights = read_one(piece.ffn)
    others = [] if fixed else measured_widths(weights.width, piece.width / weights.width, multiple_of)
    return eliminated(weights, {piece.width, *others}, statistics, activation_of(piece.ffn), [piece.width])


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
    plan: Sequence[AnyPlanned],
    errors: Mapping[str, Mapping[int, float]],
    contributions: Mapping[str, float],
    multiple_of: int,
) -> dict[str, int]:
    """The widths of those FFNs that become narrower.

    Args:
        plan: with the widths that FFNs have if all have the same share: what they hold then is the budget.
        errors: FFN name -> width -> its error, that of all its experts together if it has any; the planned width is
            among them.
        contributions: FFN name -> its part in what all do to the predictions with the planned widths.
        multiple_of: what a width is a multiple of.

    Returns:
        FFN name -> width below the full one, in the plan's order; none if there is nothing to allocate.
    """
    free = [p for p in plan if errors.get(p.ffn.name)]
    if not free:
        return {}
    curves = [ErrorCurve(p.ffn.width, p.ffn.neuron_parameters, errors[p.ffn.name]) for p in free]
    curves = in_company(curves, [p.width for p in free], [contributions[p.ffn.name] for p in free])
    budget = sum(p.ffn.neuron_parameters * p.width for p in free)
    widths = dict(zip((p.ffn.name for p in free), allocate(curves, budget, multiple_of), strict=True))
    found = {p.ffn.name: widths.get(p.ffn.name, p.width) for p in plan}
    return {p.ffn.name: found[p.ffn.name] for p in plan if found[p.ffn.name] < p.ffn.width}
