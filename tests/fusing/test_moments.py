"""Moments summed about a shift: against those of all tokens in float64, and over ranks."""

from __future__ import annotations

import pytest
import torch
from test_calibrated import draw
from torch import Tensor

from peft_fusion.fusing.moments import MomentSums

WIDTH, OUT = 8, 5


def tokens(count: int, mean: float) -> tuple[Tensor, Tensor]:
    g = draw(count, WIDTH, seed=1) @ draw(WIDTH, WIDTH, seed=2)
    return (g + mean).float(), (g @ draw(WIDTH, OUT, seed=3) - 2 * mean).float()


def summed(g: Tensor, y: Tensor, dtype: torch.dtype = torch.float32) -> MomentSums:
    sums = MomentSums(WIDTH, OUT, dtype=dtype)
    for start in range(0, len(g), 70):
        sums.add(g[start : start + 70], y[start : start + 70])
    return sums


def check(sums: MomentSums, g: Tensor, y: Tensor, tolerance: float) -> None:
    g, y = g.double(), y.double()
    moments = sums.moments()
    sizes, out_sizes = g.std(0), y.std(0)
    expected = torch.cat([g, y], dim=1).T.cov(correction=0)
    assert moments.gram.dtype == torch.float64
    gram = (moments.gram - expected[:WIDTH, :WIDTH]) / torch.outer(sizes, sizes)
    cross = (moments.cross - expected[:WIDTH, WIDTH:]) / torch.outer(sizes, out_sizes)
    assert float(gram.abs().max()) < tolerance and float(cross.abs().max()) < tolerance
    torch.testing.assert_close(moments.mean, g.mean(0), rtol=1e-8, atol=1e-6)
    torch.testing.assert_close(moments.mean_out, y.mean(0), rtol=1e-8, atol=1e-6)


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_moments_are_those_of_all_tokens(mean, dtype, tolerance):
    g, y = tokens(1000, mean)
    check(summed(g, y, dtype), g, y, tolerance)


@pytest.mark.parametrize("share", [500, 900, 1000])
def test_the_sums_of_two_ranks_add_up_to_those_of_one(share):
    g, y = tokens(1000, 1e3)
    ranks = [summed(g[:share], y[:share]), summed(g[share:], y[share:])]
    for rank in ranks:
        rank.reshift(g.double().mean(0), y.double().mean(0))
    for name in ("gram", "cross", "sum", "sum_out", "total"):
        setattr(ranks[0], name, getattr(ranks[0], name) + getattr(ranks[1], name))
    check(ranks[0], g, y, 1e-5)


def test_moments_about_zero_are_second_moments():
    g, y = tokens(500, 3.0)
    moments = summed(g, y, torch.float64).moments().about_zero()
    torch.testing.assert_close(moments.gram, g.double().T @ g.double() / 500, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moments.cross, g.double().T @ y.double() / 500, rtol=1e-9, atol=1e-9)
    assert moments.mean is None and moments.about_zero() is moments


def test_moments_in_a_metric_are_those_of_outputs_in_its_coordinates():
    (g, y), root = tokens(500, 3.0), draw(OUT, OUT, seed=5)
    found = summed(g, y, torch.float64).moments().in_metric(root)
    expected = summed(g, (y.double() @ root), torch.float64).moments()
    torch.testing.assert_close(found.cross, expected.cross)
    torch.testing.assert_close(found.mean_out, expected.mean_out)
    assert summed(g, y).moments().in_metric(None).mean_out is not None
