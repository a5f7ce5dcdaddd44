"""The baseline "pruning": keep the neurons that matter most, whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows import check_width, select_rows
from ..weights import FFNWeights, NarrowFFN


def pruning(weights: FFNWeights, width: int) -> NarrowFFN:
    """Keeps the neurons whose weights have the largest product of norms, the same ones in every matrix.

        plain:  |w1_i| * |w2_i|      gated:  |wg_i| * |wu_i| * |w2_i|

    Args:
        weights: the FFN's weights.
        width: the number of neurons kept, from 1 to `weights.width`.

    Returns:
        The narrow FFN, with a scale of ones.

    Raises:
        ValueError: if `width` is out of range.
    """
    return keep_best(weights, width, norm_products(weights))


def keep_best(weights: FFNWeights, width: int, scores: Tensor) -> NarrowFFN:
    """Keeps the neurons of the largest scores, an activation saliency say; of equal ones the first.

    Args:
        weights: the FFN's weights.
        width: the number of neurons kept, from 1 to `weights.width`.
        scores: tensor of shape (neurons,).

    Returns:
        The narrow FFN, its neurons in their original order, with a scale of ones; at full width, the FFN itself.

    Raises:
        ValueError: if `width` is out of range, or `scores` has another shape or is not finite.
    """
    check_width(weights, width)
    if scores.shape != (weights.width,):
        raise ValueError(
            f"`scores` must hold one number for each of the {weights.width} neurons, but its shape is "
            f"{tuple(scores.shape)}."
        )
    if not bool(scores.isfinite().all()):
        raise ValueError("`scores` holds NaN or infinite values; check the weights or the calibration batches.")
    ones = torch.ones(width, device=weights.out_weight.device)
    if width == weights.width:
        return NarrowFFN(weights, ones)
    best = scores.argsort(descending=True, stable=True)[:width].sort().values
    return NarrowFFN(select_rows(weights, best.to(weights.out_weight.device)), ones)


def norm_products(weights: FFNWeights) -> Tensor:
    """The product of the norms of each neuron's weights (biases left out), float64 of shape (neurons,)."""
    products = torch.ones(weights.width, dtype=torch.float64, device=weights.out_weight.device)
    for matrix in (*weights.in_weights, weights.out_weight):
        products *= torch.linalg.vector_norm(matrix, dim=1, dtype=torch.promote_types(matrix.dtype, torch.float32))
    return products
