"""Gram matrices of rows that come in blocks: all that clustering needs to know of the rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

ROW_TILE = 512
"""Rows per product: small enough that little of the upper triangle is computed, large enough for the BLAS."""

COLUMN_TILE = 1024
"""Columns per product, so that of a half-precision block only so many are held in `dtype`."""

ALIGNMENT = 64
"""Rows are padded to a multiple: else the BLAS computes the last ones in an order that depends on the threads."""


def gram_matrix(
    blocks: Sequence[Tensor], weights: Sequence[float] | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The inner products of rows `[B_1 | B_2 | ...]`, `sum_k weights[k] * B_k @ B_k.T`, without stacking them.

    Only the lower triangle is computed, then mirrored: the result is exactly symmetric and costs little more than
    half the full product. Half-precision blocks are converted a few columns at a time.

    Args:
        blocks: tensors of shape (n, d_k), of any floating dtype, on one device. At least one.
        weights: a factor >= 0 for each block; None: all 1.
        dtype: the result's dtype, float32 or float64. It is float64 in two more cases: when a block is, and when the
            rows are so large or so small that their squares leave the range of float32 (rows of norm 1e20, say).

    Returns:
        Symmetric tensor of shape (n, n).

    Raises:
        ValueError: if there is no block, the blocks' shapes do not match, a weight is negative, or rows are not finite.
    """
    weights = [1.0] * len(blocks) if weights is None else list(weights)
    _check(blocks, weights)
    if any(block.dtype == torch.float64 for block in blocks):
        dtype = torch.float64
    gram = _accumulate(blocks, weights, dtype)
    if dtype == torch.float32 and not _in_range(gram, blocks):
        dtype, gram = torch.float64, _accumulate(blocks, weights, torch.float64)
    if not bool(gram.diagonal().isfinite().all()):
        raise ValueError("The rows hold NaN or infinite values, or their squares overflow; check the weights given.")
    return gram


def _check(blocks: Sequence[Tensor], weights: Sequence[float]) -> None:
    if not blocks:
        raise ValueError("`blocks` is empty: give at least one tensor of shape (n, d).")
    shapes = [tuple(block.shape) for block in blocks]
    if any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(f"`blocks` must be matrices with one row a neuron, the same number in each; got {shapes}.")
    if len(weights) != len(blocks) or not all(0 <= weight < float("inf") for weight in weights):
        raise ValueError(f"`weights` must be {len(blocks)} finite numbers >= 0, one for each block; got {weights}.")


def _accumulate(blocks: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    rows = blocks[0].shape[0]
    n = rows + -rows % ALIGNMENT
    gram = torch.zeros(n, n, dtype=dtype, device=blocks[0].device)
    for block, weight in zip(blocks, weights, strict=True):
        for part in block.split(COLUMN_TILE, dim=1):
            part = pad(part.to(dtype), (0, 0, 0, n - rows)) if n > rows else part.to(dtype)
            add_products(gram, part, weight)
    mirror(gram)
    return gram[:rows, :rows].contiguous()


def add_products(gram: Tensor, rows: Tensor, factor: float = 1.0) -> None:
    """Add `factor * rows @ rows.T` to the lower triangle of a matrix: little more than half the full product.

    Args:
        gram: tensor of shape (n, n), written in place; what is above its diagonal means nothing until `mirror`.
        rows: tensor of shape (n, d), of the same dtype.
        factor: of the products.
    """
    for start in range(0, len(rows), ROW_TILE):
        stop = min(start + ROW_TILE, len(rows))
        gram[start:stop, :stop].addmm_(rows[start:stop], rows[:stop].T, alpha=factor)


def mirror(gram: Tensor) -> None:
    """Copy the lower triangle onto the upper one, in place, tile by tile."""
    for start in range(0, gram.shape[0], ROW_TILE):
        rows = slice(start, start + ROW_TILE)
        gram[:start, rows] = gram[rows, :start].T
        corner = gram[rows, rows].tril()
        gram[rows, rows] = corner + corner.tril(-1).T


def _in_range(gram: Tensor, blocks: Sequence[Tensor]) -> bool:
    """Whether float32 held the squared norms: finite, and not lost to underflow."""
    largest = gram.diagonal().max()
    if not bool(largest.isfinite()):
        return False
    return float(largest) > 1e-24 or all(not bool(block.any()) for block in blocks)
