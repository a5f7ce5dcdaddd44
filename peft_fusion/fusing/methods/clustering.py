"""The baseline "clustering": the method's centroids, the clusters' sizes folded into the weights."""

from __future__ import annotations

import torch

from ..rows import multiply_effect
from ..weights import FFNWeights, NarrowFFN, cast
from .fusion import fuse


def clustering(
    weights: FFNWeights,
    width: int,
    *,
    homogeneity: int | None = None,
    n_init: int | None = None,
    max_iter: int | None = None,
    seed: int = 0,
) -> NarrowFFN:
    """The centroids of `fuse`, with the square root of the clusters' sizes P in both projections (paper, 5.1).

        plain:  (P^.5 W2c) act(P^.5 W1c x + P^.5 b1c) + b2
        gated:  (P^.5 W2c) (act(Wgc x) * P^.5 Wuc x) + b2

    For a plain FFN only the linear part of the function is that of the fused one: GELU sees inputs P^.5 times as
    large. For a gated FFN the function is the fused one; what differs is the training, as no scale stands alone.

    Args:
        weights: the FFN's weights.
        width: the number of centroids, from 1 to `weights.width`.
        homogeneity: for a plain FFN, its activation's degree of homogeneity (1 for ReLU); None if it has none.
        n_init: restarts of the clustering; None for the engine's default.
        max_iter: iterations of the clustering; None for the engine's default.
        seed: makes the clustering repeatable.

    Returns:
        The narrow FFN, with a scale of ones, in the dtype of `weights`; at full width, the FFN itself.

    Raises:
        ValueError: if `width` is out of range.
    """
    fused = fuse(weights, width, homogeneity=homogeneity, n_init=n_init, max_iter=max_iter, seed=seed)
    ones = torch.ones_like(fused.scale)
    if width == weights.width:
        return NarrowFFN(weights, ones)
    sized = multiply_effect(fused.weights, fused.scale.double())
    return NarrowFFN(cast(sized, weights.out_weight.dtype), ones)
