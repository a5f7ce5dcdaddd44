"""Width budgets: nothing within the budget errs less, and what cannot be is refused."""

from __future__ import annotations

import itertools
import math

import pytest

from peft_fusion.fusing.budget import (
    MOST_APART,
    ErrorCurve,
    _between,
    _lower_hull,
    allocate,
    in_company,
    measured_widths,
)


def convex(width: int, size: float, parameters: int = 1, power: float = 2.0) -> ErrorCurve:
    """An FFN whose error is `size` times the share of missing neurons to a power."""
    return ErrorCurve(width, parameters, {w: size * (1 - w / width) ** power for w in range(1, width)})


@pytest.mark.parametrize("budget", range(6, 31))
def test_no_other_widths_err_less(budget):
    curves = [convex(8, 1.0), convex(10, 3.0, power=3.0), convex(12, 0.2, power=1.5)]

    def error(widths) -> float:
        return sum(0.0 if w == c.width else c.errors[w] for c, w in zip(curves, widths, strict=True))

    choices = itertools.product(*(range(1, curve.width + 1) for curve in curves))
    best = min(error(widths) for widths in choices if sum(widths) <= budget)
    found = allocate(curves, budget, 1)
    assert sum(found) <= budget
    assert error(found) == pytest.approx(best)


def test_an_ffn_whose_error_counts_for_more_in_company_gets_more_neurons():
    curves = [convex(64, 1.0), convex(64, 1.0), convex(64, 1.0)]
    alone = curves[0].errors[32]
    found = in_company(curves, [32, 32, 32], [0.5 * alone, 1.0 * alone, 1.5 * alone])
    assert [curve.errors[32] / alone for curve in found] == pytest.approx([0.5, 1.0, 1.5])
    assert found[2].errors[10] == pytest.approx(1.5 * curves[2].errors[10])
    widths = allocate(found, 3 * 32, 1)
    assert widths[0] < widths[1] < widths[2]
    assert allocate(in_company(curves, [32] * 3, [7.0] * 3), 3 * 32, 1) == allocate(curves, 3 * 32, 1)


@pytest.mark.parametrize("least", [0.0, -1.0, 1e-9])
def test_no_ffn_is_given_up_because_of_a_little_text(least):
    curves = [convex(64, 1.0), convex(64, 1.0)]
    found = in_company(curves, [32, 32], [least, 100.0])
    mean = (least + 100) / (curves[0].errors[32] + curves[1].errors[32])
    assert found[0].errors[32] == pytest.approx(curves[0].errors[32] / MOST_APART)
    assert found[1].errors[32] == pytest.approx(100.0 / mean)
    assert in_company(curves, [32, 32], [0.0, 0.0]) == curves


def test_neurons_count_by_their_parameters():
    same, dear = convex(64, 1.0), convex(64, 1.0, parameters=4)
    widths = allocate([same, dear], 5 * 32, 1)
    assert widths[0] > widths[1]
    assert 5 * 32 - 4 <= widths[0] + 4 * widths[1] <= 5 * 32


def test_widths_are_multiples_unless_whole():
    curves = [convex(36, size) for size in (0.001, 1.0, 1000.0)]
    curves = [ErrorCurve(36, 1, {w: c.errors[w] for w in (8, 16, 24, 32)}) for c in curves]
    widths = allocate(curves, 3 * 20, 8)
    assert all(width % 8 == 0 or width == 36 for width in widths)
    assert widths == sorted(widths) and widths[0] == 8 and widths[2] == 36
    assert sum(widths) <= 60


def test_a_budget_for_all_leaves_all_whole():
    curves = [convex(16, 1.0), convex(24, 0.1)]
    assert allocate(curves, 40, 4) == [16, 24]


def test_a_step_that_is_too_large_leaves_the_budget_to_others():
    jump = ErrorCurve(100, 1, {10: 100.0, 50: 99.0})  # above the line to its end: all of its steps are one
    gentle = convex(20, 1.0)
    assert allocate([jump, gentle], 10 + 15, 1) == [10, 15]


def test_too_small_a_budget_is_refused():
    with pytest.raises(ValueError, match=r"A budget of 3 parameters is 1 too few for the smallest widths, \[4\]"):
        allocate([ErrorCurve(8, 1, {4: 1.0})], 3, 4)


@pytest.mark.parametrize("errors", [{}, {8: 1.0}, {0: 1.0}, {4: -1.0}, {4: math.nan}, {4: math.inf}])
def test_what_is_no_curve_is_refused(errors):
    with pytest.raises(ValueError, match="finite errors at widths below 8"):
        ErrorCurve(8, 1, errors)


def test_between_widths_the_logarithm_is_straight():
    known = [(10, 8.0), (20, 2.0)]
    assert _between(known, 40, 15) == pytest.approx(4.0)
    assert _between(known, 40, 20) == 2.0
    assert _between(known, 40, 30) == pytest.approx(1.0)  # up to nothing at full width, on a line
    assert _between([(10, 8.0), (20, 0.0)], 40, 15) == 4.0


def test_errors_that_rise_or_bend_the_wrong_way_are_passed_over():
    points = [(1, 10.0), (2, 9.9), (3, 4.0), (4, 4.5), (5, 1.0), (6, 0.0)]
    assert _lower_hull(points) == [(1, 10.0), (3, 4.0), (5, 1.0), (6, 0.0)]


@pytest.mark.parametrize("width", [8, 64, 100, 1536])
@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("multiple_of", [1, 8])
def test_measured_widths(width, share, multiple_of):
    widths = measured_widths(width, share, multiple_of)
    assert widths == sorted(set(widths))
    assert all(0 < found < width and found % multiple_of == 0 for found in widths)
    uniform = multiple_of * math.ceil(share * width / multiple_of)
    if widths:
        assert widths[0] <= uniform  # so that the budget always suffices for the smallest widths
    if width * share >= 16 and share < 0.9:
        assert len(widths) >= 5
