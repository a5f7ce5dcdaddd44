"""Inner products between sub-MLPs: how alike two neurons are, by their weights or by what they do.

A sub-MLP's output is the random vector h_i(x) w2_i, so that over the calibration tokens

    outputs:  K_ij = E[h_i h_j] <w2_i, w2_j>
    fisher:   K_ij = E[h_i h_j] <w2_i, F w2_j>,  F = E[d d^T]
    ntk:      adds the gradient features, h_i for w2_i and h'_i |w2_i| |x| for each in-weight:
              K_ij + a E[h_i h_j] + sum_k b_k E[h'_ik h'_jk |x|^2] <w2_i, w2_j>

With d the gradient of the model's log-likelihood by what the FFN puts out, F is the Fisher information of that output:
the squared length of an error in its metric is, to second order, the change of the model's predictions. What the layers
above do not look at costs nothing there.

The first two do not depend on how a sub-MLP is parametrised; the last does, as gradients do, and is taken in the
balanced coordinates of `symmetry`. Its parts are given equal traces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import Activation, look_inside
from .cluster.gram import gram_matrix
from .symmetry import balancing_factors, rescale
from .weights import FFNWeights

FLATTENING = 0.1
"""How much of the identity is added to the Fisher information, relative to its mean eigenvalue: it is an estimate."""


def weight_kernel(weights: FFNWeights, homogeneity: int | None = None) -> Tensor:
    """The paper's kernel: inner products of the rows `[w1 | b1 | w2]`, in balanced coordinates.

    Args:
        weights: the FFN's weights.
        homogeneity: for a plain FFN, its activation's homogeneity of homogeneity; None if it has none.

    Returns:
        Symmetric tensor of shape (neurons, neurons).
    """
    factor = balancing_factors(weights, homogeneity)
    balanced = weights if factor is None else rescale(weights, factor, homogeneity or 1)
    return gram_matrix(balanced.blocks())


def output_kernel(out_weight: Tensor, second_moment: Tensor) -> Tensor:
    """Inner products of the sub-MLPs' outputs over calibration tokens.

    Args:
        out_weight: tensor of shape (neurons, out_dim); times `metric_root`, it makes the kernel "fisher".
        second_moment: E[h h^T], tensor of shape (neurons, neurons).

    Returns:
        Symmetric tensor of shape (neurons, neurons).
    """
    return gram_matrix([out_weight]).mul_(second_moment.to(out_weight.device))


def metric(fisher: Tensor) -> Tensor:
    """The metric M in which outputs are compared, <y, M y>: the Fisher information at a common size, flattened.

    Args:
        fisher: E[d d^T], tensor of shape (out_dim, out_dim), of any scale.

    Returns:
        Tensor of the same shape and device in float64, of mean eigenvalue 1 + `FLATTENING`.
    """
    scaled = fisher.double() / fisher.diagonal().mean().clamp(min=1e-30)
    scaled.diagonal().add_(FLATTENING)
    return scaled


def metric_root(fisher: Tensor) -> Tensor:
    """The symmetric root R of the metric: <y, M y> = |R y|^2.

    Args:
        fisher: E[d d^T], tensor of shape (out_dim, out_dim), of any scale.

    Returns:
        Tensor of the same shape, dtype and device.
    """
    values, vectors = torch.linalg.eigh(metric(fisher))
    return (vectors * values.clamp(min=0).sqrt() @ vectors.T).to(fisher.dtype)


def ntk_kernel(
    weights: FFNWeights,
    second_moment: Tensor,
    inputs: Tensor,
    activation: Activation,
    homogeneity: int | None = None,
) -> Tensor:
    """Inner products of the sub-MLPs' outputs and gradients over calibration tokens.

    Args:
        weights: the FFN's weights.
        second_moment: E[h h^T], tensor of shape (neurons, neurons).
        inputs: tensor of shape (tokens, in_dim), for the derivatives.
        activation: the activation function.
        homogeneity: for a plain FFN, its activation's homogeneity of homogeneity; None if it has none.

    Returns:
        Symmetric tensor of shape (neurons, neurons).
    """
    moment = second_moment.to(weights.out_weight.device)
    factor = balancing_factors(weights, homogeneity)
    if factor is not None:
        weights = rescale(weights, factor, homogeneity or 1)
        moment = moment * torch.outer(factor, factor) ** (homogeneity or 1)
    out = gram_matrix([weights.out_weight])
    outputs = moment * out
    x = inputs.to(outputs)
    slopes = look_inside(weights, activation, x).slopes
    parts = [moment, *(_moment(slope * x.norm(dim=1, keepdim=True)).mul_(out) for slope in slopes)]
    trace = outputs.trace()
    return sum((part * (trace / part.trace().clamp(min=1e-30)) for part in parts), outputs)


def _moment(values: Tensor) -> Tensor:
    """E[v v^T] over the rows."""
    return values.T @ values / max(len(values), 1)
