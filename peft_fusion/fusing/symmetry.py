"""The symmetries of a sub-MLP: rescalings of its weights that leave its function unchanged.

A gated sub-MLP is unchanged by (w_up, b_up, w_out) -> (a w_up, a b_up, w_out / a) for every a != 0; a plain one
whose activation is homogeneous of degree k (ReLU: 1, squared ReLU: 2) by (w_in, b_in, w_out) -> (a w_in, a b_in,
w_out / a^k) for every a > 0. Distances between sub-MLPs mean something only in coordinates that do not depend on
such a choice, so neurons are balanced before they are clustered, and centroids are given their cluster's typical
scale back: Adam's steps do depend on the scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .weights import FFNWeights


def balancing_factors(weights: FFNWeights, homogeneity: int | None = None) -> Tensor | None:
    """The factor per neuron that balances its in- and out-weights.

    Args:
        weights: an FFN's weights.
        homogeneity: for a plain FFN, the degree of homogeneity of its activation; None if it is not homogeneous; 0 for
            a gated one whose hidden activations are not linear in its second piece, so that it has no symmetry either.

    Returns:
        Tensor of shape (neurons,), or None if the FFN has no such symmetry. Gated: the sign makes the up-weights'
        largest entry positive.
    """
    if homogeneity == 0 or (not weights.gated and homogeneity is None):
        return None
    index, power = (1, 1) if weights.gated else (0, homogeneity or 1)
    dtype = torch.promote_types(weights.out_weight.dtype, torch.float32)
    norm_in = weights.in_weights[index].to(dtype).square().sum(1)
    bias = weights.in_biases[index]
    if bias is not None:
        norm_in = norm_in + bias.to(dtype).square()
    norm_in, norm_out = norm_in.double().sqrt(), weights.out_weight.to(dtype).norm(dim=1).double()
    factor = (norm_out / norm_in) ** (1 / (1 + power))
    factor = torch.where((norm_in > 0) & (norm_out > 0), factor, torch.ones_like(factor))
    if weights.gated:
        up = weights.in_weights[index]
        largest = up.gather(1, up.abs().argmax(1, keepdim=True)).squeeze(1)
        factor = torch.where(largest < 0, -factor, factor)
    return factor.to(dtype)


def rescale(weights: FFNWeights, factor: Tensor, homogeneity: int = 1) -> FFNWeights:
    """The same function with each neuron's in-weights times `factor` and its out-weights over `factor ** homogeneity`.

    Args:
        weights: an FFN's weights (gated: the up-projection is rescaled, the gate is not).
        factor: tensor of shape (neurons,), nowhere 0.
        homogeneity: the activation's degree of homogeneity (1 for gated FFNs).

    Returns:
        The rescaled weights, of the factor's dtype.
    """
    index = len(weights.in_weights) - 1
    in_weights, in_biases = list(weights.in_weights), list(weights.in_biases)
    in_weights[index] = in_weights[index] * factor.unsqueeze(1)
    bias = in_biases[index]
    in_biases[index] = None if bias is None else bias * factor
    out_weight = weights.out_weight / (factor**homogeneity).unsqueeze(1)
    return FFNWeights(tuple(in_weights), tuple(in_biases), out_weight, weights.out_bias)
