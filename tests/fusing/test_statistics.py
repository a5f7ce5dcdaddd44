"""What is accumulated of hidden activations, against the same in float64, over ranks, and in full float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_fusion.fusing.statistics import SAMPLE_TOKENS, FFNStatistics

WIDTH = 12


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(tokens: int, mean: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Activations of unit variance about a mean, as the dtype holds them."""
    mixing = draw(WIDTH, WIDTH, seed=1) / WIDTH**0.5
    return (mean + draw(tokens, WIDTH, seed=2) @ mixing).to(dtype)


def gathered(parts: list[Tensor]) -> FFNStatistics:
    statistics = FFNStatistics(WIDTH, 3)
    for part in parts:
        statistics.add(part)
    return statistics


def spread(covariance: Tensor) -> Tensor:
    deviation = covariance.diagonal().sqrt()
    return torch.outer(deviation, deviation)


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_covariance_is_accurate_however_large_the_mean(mean, dtype):
    hidden = correlated(3000, mean, dtype)
    statistics = gathered(list(hidden.split(100)))
    expected = hidden.double().T.cov(correction=0)
    assert statistics.covariance.dtype == torch.float32 and statistics.mean.dtype == torch.float64
    assert float(((statistics.covariance - expected) / spread(expected)).abs().max()) < 1e-5
    torch.testing.assert_close(statistics.mean, hidden.double().mean(0), rtol=1e-9, atol=1e-7)
    second = hidden.double().T @ hidden.double() / len(hidden)
    torch.testing.assert_close(statistics.second_moment.double(), second, rtol=1e-5, atol=1e-5)


def test_a_constant_neuron_has_no_variance():
    hidden = correlated(500, 0.0)
    hidden[:, 3] = 7.3
    statistics = gathered(list(hidden.split(50)))
    assert float(statistics.covariance[3].abs().max()) < 1e-10
    assert float(statistics.mean[3]) == pytest.approx(7.3)


def test_the_first_tokens_only_set_where_sums_start_from():
    hidden = correlated(1000, 0.0)
    hidden[:10] += 30  # unlike all that follow
    found = gathered([hidden[:0], hidden[:10], hidden[10:]])
    assert found.tokens == 1000
    expected = hidden.double().T.cov(correction=0)
    assert float(((found.covariance - expected) / spread(expected)).abs().max()) < 1e-4


@pytest.mark.parametrize("shares", [(500, 500), (900, 100), (1000, 0)])
def test_the_sums_of_two_ranks_add_up_to_those_of_one(shares):
    hidden = correlated(1000, 1e3)
    ranks = [gathered(list(part.split(50)) if len(part) else []) for part in hidden.split(shares)]
    mean = sum(rank.mean * rank.tokens for rank in ranks) / 1000
    for rank in ranks:
        rank.reshift(mean)
    for name in ("product", "sum", "total"):
        setattr(ranks[0], name, getattr(ranks[0], name) + getattr(ranks[1], name))
    expected = hidden.double().T.cov(correction=0)
    assert float(((ranks[0].covariance - expected) / spread(expected)).abs().max()) < 1e-5
    torch.testing.assert_close(ranks[0].mean, hidden.double().mean(0), rtol=1e-9, atol=0)


def test_moving_the_shift_changes_nothing_but_the_sums():
    statistics = gathered([correlated(1000, 5.0)])
    covariance, mean = statistics.covariance, statistics.mean
    statistics.reshift(mean + 2)
    torch.testing.assert_close(statistics.shift.double(), mean + 2)
    torch.testing.assert_close(statistics.sum, torch.full_like(mean, -2000), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.mean, mean)
    torch.testing.assert_close(statistics.covariance, covariance, rtol=1e-4, atol=1e-5)


def test_held_out_inputs_are_kept_up_to_a_bound():
    statistics = FFNStatistics(WIDTH, 3)
    assert statistics.held_out.shape == (0, 3)
    for size in (SAMPLE_TOKENS - 1, 5, 5):
        statistics.hold_out(torch.ones(size, 3))
    assert statistics.held_out.shape == (SAMPLE_TOKENS, 3) and statistics.held_out_tokens == SAMPLE_TOKENS
