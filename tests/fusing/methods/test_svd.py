"""The baseline "svd" against its definition."""

from __future__ import annotations

import pytest
import torch

from peft_fusion.fusing.methods.svd import rank_factors, rank_for


@pytest.mark.parametrize(("inner", "outer", "fraction"), [(32, 64, 0.5), (64, 32, 0.25), (7, 300, 0.9), (5, 5, 0.01)])
def test_rank_saves_what_it_should_and_no_more(inner, outer, fraction):
    rank = rank_for(inner, outer, fraction)
    assert rank == 1 or rank * (inner + outer) <= fraction * inner * outer
    assert (rank + 1) * (inner + outer) > fraction * inner * outer


def test_nothing_to_save_is_the_full_rank():
    assert rank_for(7, 300, 1.0) == 7


def test_factors_are_the_truncated_sum_of_outer_products():
    matrix = torch.randn(9, 6, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix)
    expected = torch.zeros_like(matrix)
    for k in range(3):
        expected += s[k] * torch.outer(u[:, k], v[k])
    left, right = rank_factors(matrix, 3)
    assert (left.shape, right.shape) == ((9, 3), (3, 6))
    torch.testing.assert_close(left @ right, expected)
    torch.testing.assert_close(left.norm(), right.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_full_rank_is_the_matrix(dtype):
    matrix = torch.randn(9, 6).to(dtype)
    left, right = rank_factors(matrix, 6)
    assert left.dtype == torch.float32
    torch.testing.assert_close(left @ right, matrix.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 7])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=f"is 1 to 6, not {rank}"):
        rank_factors(torch.randn(9, 6), rank)
