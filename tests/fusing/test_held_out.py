"""What an out-projection is judged on: against the tokens one by one, in float64."""

from __future__ import annotations

import pytest
import torch
from test_calibrated import draw

from peft_fusion.fusing.held_out import HeldOut

WIDTH, OUT = 8, 5


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_the_error_is_that_of_the_tokens(offset, dtype, tolerance, weighed):
    hidden, y = (draw(700, WIDTH, seed=1) + offset).to(dtype), (draw(700, OUT, seed=2) + 1).to(dtype)
    weight, shift = draw(WIDTH, OUT, seed=3).to(dtype), draw(1, OUT, seed=4)[0].to(dtype)
    weights = draw(700, 1, seed=5).abs().float()
    held_out, shares = (
        HeldOut.of(hidden.clone(), y, weights[:, 0] if weighed else None),
        weights if weighed else torch.ones(1),
    )
    size = float((shares * y.double().square()).sum())
    assert held_out.size == pytest.approx(size / float(shares.sum() if weighed else 700), rel=1e-5)
    for bias in (None, shift):
        missed = hidden.double() @ weight.double() + (0 if bias is None else bias.double()) - y.double()
        expected = float((shares * missed.square()).sum()) / size
        assert held_out.error(weight, bias) == pytest.approx(expected, rel=tolerance)


def test_a_small_error_is_not_lost_among_large_means():
    hidden, weight = draw(700, WIDTH, seed=1) + 100, draw(WIDTH, OUT, seed=3)
    y = hidden @ weight
    assert HeldOut.of(hidden.clone(), y).error(weight) < 1e-24
    held_out = HeldOut.of(hidden.float(), y.float())
    wrong = weight + 1e-4 * draw(WIDTH, OUT, seed=6)
    centred = hidden - hidden.mean(0)
    expected = float(
        (centred @ (wrong - weight)).square().sum() + 700 * (hidden.mean(0) @ (wrong - weight)).square().sum()
    )
    assert held_out.error(wrong) == pytest.approx(expected / float(y.square().sum()), rel=0.05)


def test_the_error_of_some_neurons_is_that_of_their_columns():
    hidden, y, weight = draw(300, WIDTH, seed=1), draw(300, OUT, seed=2), draw(3, OUT, seed=3)
    kept = torch.tensor([1, 4, 6])
    some, expected = HeldOut.of(hidden.clone(), y).of_neurons(kept), HeldOut.of(hidden[:, kept].clone(), y)
    assert some.error(weight) == pytest.approx(expected.error(weight), rel=1e-12)
    torch.testing.assert_close(some.moments().gram, expected.moments().gram)


def test_its_moments_are_those_of_the_tokens():
    hidden, y = draw(300, WIDTH, seed=1) + 3, draw(300, OUT, seed=2)
    moments = HeldOut.of(hidden.clone(), y).moments()
    expected = torch.cat([hidden, y], dim=1).T.cov(correction=0)
    torch.testing.assert_close(moments.gram, expected[:WIDTH, :WIDTH])
    torch.testing.assert_close(moments.cross, expected[:WIDTH, WIDTH:])
    torch.testing.assert_close(moments.mean, hidden.mean(0))
    torch.testing.assert_close(moments.mean_out, y.mean(0))


def test_an_error_that_is_no_number_is_not_the_smallest():
    error = HeldOut.of(draw(20, WIDTH, seed=1), draw(20, OUT, seed=2)).error(torch.full((WIDTH, OUT), torch.nan))
    assert error != error
