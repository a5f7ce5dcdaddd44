"""Inner products between sub-MLPs: how alike two neurons are, by their weights or by what they do.

A sub-MLP's output is the random vector h_i(x) w2_i, so that over the calibration tokens

    outputs:  K_ij = E[h_i h_j] <w2_i, w2_j>
    fisher:   K_ij = E[h_i h_j] <w2_i, F w2_j>,  F = E[d d^T]
    ntk:      adds the gradient features, h_i for w2_i and h'_i |w2_i| |x| for each in-weight:
              K_ij + a E[h_i h_j] + sum_k b_k E[h'_ik h'_jk |x|^2] <w2_i, w2_j>

F is the Fisher information of what the FFN puts out (see `metric`). All but the last and that of the weights do not
depend on how a sub-MLP is parametrised; the last does, as gradients do, and is taken in the balanced coordinates of
`symmetry`. Its parts are given equal traces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from .activations import Activation, in_chunks, look_inside
from .cluster.gram import gram_matrix
from .known import KnownFFN
from .moments import weighted
from .symmetry import balancing_factors, rescale
from .weights import FFNWeights


def weight_kernel(weights: FFNWeights, homogeneity: int | None = None) -> Tensor:
    """The paper's kernel: inner products of the rows `[w1 | b1 | w2]`, in balanced coordinates.

    Args:
        weights: the FFN's weights.
        homogeneity: for a plain FFN, its activation's degree of homogeneity; None if it has none.

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


def ntk_kernel(
    weights: FFNWeights,
    second_moment: Tensor,
    inputs: Tensor,
    activation: Activation,
    homogeneity: int | None = None,
    token_weights: Tensor | None = None,
) -> Tensor:
    """Inner products of the sub-MLPs' outputs and gradients over calibration tokens.

    Args:
        weights: the FFN's weights.
        second_moment: E[h h^T], tensor of shape (neurons, neurons); overwritten, as there is little room for such.
        inputs: tensor of shape (tokens, in_dim), for the derivatives.
        activation: the activation function.
        homogeneity: for a plain FFN, its activation's degree of homogeneity; None if it has none.
        token_weights: of the inputs, shape (tokens,); None: all 1.

    Returns:
        Symmetric tensor of shape (neurons, neurons).
    """
    factor = balancing_factors(weights, homogeneity)
    if factor is not None:
        weights = rescale(weights, factor, homogeneity or 1)
    out, moment = gram_matrix([weights.out_weight]), second_moment.to(weights.out_weight.device)
    if factor is not None:
        power = factor ** (homogeneity or 1)
        moment = moment.mul_(power).mul_(power.unsqueeze(1))
    parts = [moment, *(torch.zeros_like(out) for _ in weights.in_weights)]
    sizes = weighted(inputs.to(out).norm(dim=1, keepdim=True), token_weights)
    for x, size in in_chunks(inputs, sizes):
        for part, slope in zip(parts[1:], look_inside(weights, activation, x).slopes, strict=True):
            value = slope * size
            part.addmm_(value.T, value)
    total = moment * out
    trace = total.trace()
    for part in parts[1:]:
        part.mul_(out)
    for part in parts:
        total.add_(part, alpha=_share(trace, part))
    return total


def _share(trace: Tensor, part: Tensor) -> float:
    """The factor that gives a part this trace."""
    return float(trace / part.trace().clamp(min=1e-30))


def _outputs_of(ffn: KnownFFN) -> Tensor:
    return output_kernel(ffn.seen_weight, ffn.second_moment())


@dataclass(frozen=True)
class Kernel:
    """What neurons can be compared by.

    Args:
        between: the inner products between an FFN's neurons, shape (neurons, neurons).
        needs_statistics: whether the model has to be calibrated for it.
        needs_gradients: whether the model has to have gradients for it: it compares outputs in their metric, in which
            then all errors of outputs are measured.
    """

    between: Callable[[KnownFFN], Tensor]
    needs_statistics: bool = True
    needs_gradients: bool = False


KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {
        "weights": Kernel(lambda ffn: weight_kernel(ffn.weights, ffn.homogeneity), needs_statistics=False),
        "outputs": Kernel(_outputs_of),
        "fisher": Kernel(_outputs_of, needs_gradients=True),
        "ntk": Kernel(
            lambda ffn: ntk_kernel(
                ffn.weights, ffn.second_moment(), ffn.inputs, ffn.activation, ffn.homogeneity, ffn.token_weights
            )
        ),
    }
)
"""All kernels, the paper's first."""


def find_kernel(name: str) -> Kernel:
    """A kernel by name.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in KERNELS:
        raise ValueError(f"`kernel` must be one of {', '.join(KERNELS)}, but got {name!r}.")
    return KERNELS[name]
