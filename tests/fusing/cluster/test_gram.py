"""Gram matrices from blocks, against the plain product of the stacked rows in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_fusion.fusing.cluster.gram import COLUMN_TILE, ROW_TILE, gram_matrix


def blocks(n: int, *dims: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype) for d in dims]


def reference(parts: list[Tensor], weights: list[float] | None = None) -> Tensor:
    weights = weights or [1.0] * len(parts)
    return sum(w * (part.double() @ part.double().T) for w, part in zip(weights, parts, strict=True))


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, ROW_TILE, ROW_TILE + 1, 2 * ROW_TILE + 70])
@pytest.mark.parametrize("dims", [(5,), (7, 1, 30), (COLUMN_TILE + 3, 2)])
def test_is_the_product_of_the_stacked_rows(n: int, dims: tuple[int, ...]) -> None:
    parts = blocks(n, *dims)
    gram = gram_matrix(parts)
    assert gram.dtype == torch.float32 and gram.is_contiguous()
    torch.testing.assert_close(gram.double(), reference(parts), rtol=0, atol=2e-6 * sum(dims))
    assert torch.equal(gram, gram.T)


def test_weights_multiply_the_blocks_products() -> None:
    parts = blocks(80, 6, 9, 4)
    weights = [0.5, 0.0, 3.0]
    torch.testing.assert_close(gram_matrix(parts, weights).double(), reference(parts, weights), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_give_a_float32_matrix(dtype: torch.dtype) -> None:
    parts = blocks(100, COLUMN_TILE + 40, 3, dtype=dtype)
    gram = gram_matrix(parts)
    assert gram.dtype == torch.float32
    torch.testing.assert_close(gram.double(), reference(parts), rtol=0, atol=2e-3)


def test_float64_rows_give_a_float64_matrix() -> None:
    parts = blocks(70, 40, dtype=torch.float64)
    gram = gram_matrix(parts)
    assert gram.dtype == torch.float64
    torch.testing.assert_close(gram, reference(parts), rtol=1e-12, atol=1e-12)
    assert gram_matrix([parts[0].float()], dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("size", [1e20, 1e-20])
def test_rows_whose_squares_leave_float32_give_a_float64_matrix(size: float) -> None:
    parts = [part * size for part in blocks(70, 20, 3)]
    gram = gram_matrix(parts)
    assert gram.dtype == torch.float64
    torch.testing.assert_close(gram, reference(parts), rtol=1e-9, atol=1e-12 * size**2)


def test_zero_rows_give_zeros() -> None:
    gram = gram_matrix([torch.zeros(9, 4)])
    assert gram.dtype == torch.float32 and not gram.any()


class LargestConversion(TorchDispatchMode):
    """Records the largest tensor that a change of dtype made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.numel = max(self.numel, out.numel())
        return out


def test_never_holds_a_float32_copy_of_a_half_precision_block() -> None:
    (part,) = blocks(64, 8 * COLUMN_TILE, dtype=torch.bfloat16)
    with LargestConversion() as largest:
        gram_matrix([part])
    assert 0 < largest.numel <= 64 * COLUMN_TILE


@pytest.mark.parametrize("n", [50, 100, 200, 562])
def test_same_bits_for_any_number_of_threads(n: int) -> None:
    parts, before = blocks(n, 300), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 4, 8):
            torch.set_num_threads(threads)
            results.append(gram_matrix(parts))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("parts", "weights", "message"),
    [
        ([], None, "empty"),
        ([torch.ones(3, 2), torch.ones(4, 2)], None, "same number"),
        ([torch.ones(3)], None, "matrices"),
        ([torch.ones(3, 2)], [1.0, 2.0], "1 finite numbers"),
        ([torch.ones(3, 2)], [-1.0], "finite numbers >= 0"),
        ([torch.ones(3, 2)], [float("nan")], "finite numbers >= 0"),
        ([torch.tensor([[1.0], [float("nan")]])], None, "NaN"),
        ([torch.tensor([[1.0], [float("inf")]])], None, "NaN or infinite"),
    ],
)
def test_refuses(parts: list[Tensor], weights: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gram_matrix(parts, weights)
