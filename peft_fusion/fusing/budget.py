"""Width budgets: how many neurons each of several FFNs keeps, so that together they err least.

With E_l(w) the error of FFN l at width w, in units that all FFNs share, and c_l the parameters of one of its neurons,

    minimise  sum_l E_l(w_l)   with   sum_l c_l w_l <= budget

has, where the E_l are convex, its minimum where the last neuron of every FFN is worth the same per parameter (one
Lagrange multiplier for all of them): take the best step of any FFN, then the next best, until the budget is spent.
Errors that are measured at a few widths are not convex to the last digit; their lower convex hulls are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

Point = tuple[int, float]
"""A width, and the error there."""

MOST_APART = 8.0
"""How much more or less than the mean an FFN's error may count for in company than it does alone."""


@dataclass(frozen=True)
class ErrorCurve:
    """How much an FFN errs at some widths.

    Args:
        width: its neurons; with all of them it does not err.
        parameters: of each neuron.
        errors: smaller widths -> the error there, comparable with that of other FFNs.

    Raises:
        ValueError: if there is no error, one is negative or not finite, or a width is not below the full one.
    """

    width: int
    parameters: int
    errors: Mapping[int, float]

    def __post_init__(self) -> None:
        sound = all(0 < width < self.width and 0 <= error < math.inf for width, error in self.errors.items())
        if not self.errors or not sound:
            raise ValueError(f"An error curve needs finite errors at widths below {self.width}, but got {self.errors}.")


def measured_widths(width: int, share: float, multiple_of: int) -> list[int]:
    """Where to measure an FFN's error for a budget: around the share that is kept on average, and up to nearly all.

    Args:
        width: the FFN's neurons.
        share: of the neurons, kept on average.
        multiple_of: what a width is a multiple of.

    Returns:
        Widths below the full one, ascending; none if there is none.
    """
    parts = (0.25, 0.5, 0.75)
    shares = [*(share * part for part in parts), share, *(share + (1 - share) * part for part in parts)]
    rounded = {max(1, round(part * width / multiple_of)) * multiple_of for part in shares}
    return sorted(found for found in rounded if found < width)


def in_company(curves: Sequence[ErrorCurve], widths: Sequence[int], contributions: Sequence[float]) -> list[ErrorCurve]:
    """Error curves at the size that errors have where all FFNs are narrow, and not one of them alone.

    Args:
        curves: of each FFN alone.
        widths: one of the measured widths of each.
        contributions: of each FFN to the error of all together, in any unit, where they have these widths.

    Returns:
        Each curve times one factor, so that at its width it is what the FFN contributes, in units of the curves. No
        factor is above `MOST_APART` or below its inverse, because contributions are measured on little text.
    """
    alone = [curve.errors[width] for curve, width in zip(curves, widths, strict=True)]
    mean = sum(contributions) / max(sum(alone), 1e-30)
    if not mean > 0:
        return list(curves)
    found = []
    for curve, error, contribution in zip(curves, alone, contributions, strict=True):
        factor = contribution / max(error, 1e-30) / mean
        factor = min(max(factor, 1 / MOST_APART), MOST_APART)
        found.append(replace(curve, errors={width: factor * e for width, e in curve.errors.items()}))
    return found


def allocate(curves: Sequence[ErrorCurve], budget: int, multiple_of: int) -> list[int]:
    """The widths at which FFNs together err least.

    Args:
        curves: of each FFN.
        budget: parameters that all neurons together may have.
        multiple_of: what a width, if it is not the full one, is a multiple of.

    Returns:
        The width of each FFN, none below the smallest one that was measured, none above the full one.

    Raises:
        ValueError: if the budget does not suffice for the smallest widths.
    """
    hulls = [_lower_hull(_points(curve, multiple_of)) for curve in curves]
    widths = [hull[0][0] for hull in hulls]
    left = budget - sum(curve.parameters * width for curve, width in zip(curves, widths, strict=True))
    if left < 0:
        raise ValueError(f"A budget of {budget} parameters is {-left} too few for the smallest widths, {widths}.")
    steps = [
        ((error - next_error) / (curve.parameters * (following - width)), -i, following)
        for i, (curve, hull) in enumerate(zip(curves, hulls, strict=True))
        for (width, error), (following, next_error) in zip(hull, hull[1:], strict=False)
    ]
    full = set[int]()  # FFNs of which a step was too large; the ones after it would leave it out
    for _, negative, following in sorted(steps, key=lambda step: (-step[0], -step[1], step[2])):
        cost = curves[-negative].parameters * (following - widths[-negative])
        if -negative in full or cost > left:
            full.add(-negative)
            continue
        widths[-negative], left = following, left - cost
    return widths


def _points(curve: ErrorCurve, multiple_of: int) -> list[Point]:
    """The error at every width that can be chosen: between those measured its logarithm is a straight line.

    Up to the full width, where there is none, it is the error itself that is taken to be one.
    """
    known = sorted(curve.errors.items())
    least = known[0][0]
    grid = range(-(-least // multiple_of) * multiple_of, curve.width, multiple_of)
    found = [(width, _between(known, curve.width, width)) for width in sorted({least, *grid})]
    return [*found, (curve.width, 0.0)]


def _between(known: Sequence[Point], full: int, width: int) -> float:
    above = next((i for i, (measured, _) in enumerate(known) if measured >= width), len(known))
    if above == len(known):
        (low, error), high = known[-1], full
        return error * (high - width) / (high - low)
    high, error_high = known[above]
    if high == width:
        return error_high
    low, error_low = known[above - 1]
    share = (width - low) / (high - low)
    if min(error_low, error_high) == 0:
        return error_low + share * (error_high - error_low)
    return math.exp((1 - share) * math.log(error_low) + share * math.log(error_high))


def _lower_hull(points: Sequence[Point]) -> list[Point]:
    """The corners of the largest convex function below some points, given by ascending widths."""
    hull: list[Point] = []
    for point in points:
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _above(first: Point, middle: Point, last: Point) -> bool:
    """Whether the middle one of three points lies on or above the line through the others."""
    rise = (last[1] - first[1]) * (middle[0] - first[0])
    return (middle[1] - first[1]) * (last[0] - first[0]) >= rise
