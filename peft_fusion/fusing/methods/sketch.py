"""The baseline "sketch": neurons replaced by random combinations of all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows import balance, check_width, map_rows, select_rows
from ..weights import FFNWeights, NarrowFFN, cast
from .pruning import norm_products


def sketch(
    weights: FFNWeights, width: int, *, keep: int = 0, homogeneity: int | None = None, seed: int = 0
) -> NarrowFFN:
    """A Gaussian Johnson-Lindenstrauss sketch of an FFN's neurons (paper, 5.1).

        (S^T W2) act(S^T W1 x + S^T b1) + b2,    S of shape (neurons, c), entries independent, N(0, 1/c)

    Since E[S S^T] = 1, the linear part of the function is right on average: E[W2^T S S^T W1] = W2^T W1. A gated FFN
    is a product of three matrices, and one S in all of them would have the mean 0. There, with G and H of shape
    (neurons, c) and entries N(0, 1), it is

        gate: c^(-1/2) G      up: c^(-1/4) H      out: c^(-1/4) G * H

    (* elementwise), because E[sum_j G_ij H_kj (G * H)_lj] = c where i = k = l, and 0 elsewhere.

    Args:
        weights: the FFN's weights.
        width: the number of neurons, from 1 to `weights.width`.
        keep: so many of the neurons with the largest product of norms are kept exactly, and come first; the others
            are sketched to what is left of the width.
        homogeneity: for a plain FFN, its activation's degree of homogeneity (1 for ReLU); None if it has none.
        seed: of the sketch.

    Returns:
        The narrow FFN, with a scale of ones, in the dtype of `weights`; at full width, the FFN itself.

    Raises:
        ValueError: if `width` is out of range, or `keep` is negative or not below `width`.
    """
    check_width(weights, width)
    if not 0 <= keep < width:
        raise ValueError(
            f"The sketch needs at least one neuron beside those kept exactly: `keep` must be 0 to {width - 1} for a "
            f"width of {width}, but got {keep}."
        )
    ones = torch.ones(width, device=weights.out_weight.device)
    if width == weights.width:
        return NarrowFFN(weights, ones)
    order = norm_products(weights).argsort(descending=True, stable=True)
    kept = select_rows(weights, order[:keep])
    rest = balance(select_rows(weights, order[keep:].sort().values), homogeneity)
    sketched = _sketched(rest, width - keep, torch.Generator().manual_seed(seed))
    return NarrowFFN(_joined(kept, cast(sketched, weights.out_weight.dtype)), ones)


def _sketched(weights: FFNWeights, width: int, generator: torch.Generator) -> FFNWeights:
    """All of the neurons as `width` random combinations."""

    def normal() -> Tensor:
        drawn = torch.randn(weights.width, width, generator=generator)  # on the CPU: the same for every device
        return drawn.to(weights.out_weight)

    if not weights.gated:
        s = normal().mul_(width**-0.5)
        return map_rows(weights, lambda rows: s.T @ rows)
    g, h = normal(), normal()
    gate, up, out = g * width**-0.5, h * width**-0.25, g * h * width**-0.25
    biases = tuple(None if b is None else s.T @ b for s, b in zip((gate, up), weights.in_biases, strict=True))
    ins = tuple(s.T @ w for s, w in zip((gate, up), weights.in_weights, strict=True))
    return FFNWeights(ins, biases, out.T @ weights.out_weight, weights.out_bias)


def _joined(first: FFNWeights, second: FFNWeights) -> FFNWeights:
    """The FFN of the neurons of both."""
    pairs = zip(first.in_biases, second.in_biases, strict=True)
    biases = tuple(None if a is None or b is None else torch.cat([a, b]) for a, b in pairs)
    ins = tuple(torch.cat(pair) for pair in zip(first.in_weights, second.in_weights, strict=True))
    return FFNWeights(ins, biases, torch.cat([first.out_weight, second.out_weight]), second.out_bias)
