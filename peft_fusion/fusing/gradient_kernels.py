"""Tangent kernels over sequences, without ever holding all gradients.

For a matrix `y = W x` the gradient of a sequence's f is `g = sum_t d_t x_t^T`, with x_t what goes in at token t and d_t
the gradient of f with respect to y_t. Gradients are formed some rows at a time, for all sequences, and their products
added to the kernels

    Adam   K_A(n, m) = <g_n, sign g_m>            SGD   K(n, m) = <g_n, g_m>        (paper, section 4)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .activations import Activation, look_inside
from .weights import FFNWeights

BLOCK_MEMORY = 2**24
"""Bytes of gradients that are formed at a time."""


@dataclass(frozen=True)
class TokenGradients:
    """What goes into an FFN, and the gradient that comes back to its output, over some sequences.

    Args:
        inputs: tensor of shape (tokens, in_dim).
        gradients: tensor of shape (tokens, out_dim).
        counts: each sequence's tokens, which follow one another.
    """

    inputs: Tensor
    gradients: Tensor
    counts: tuple[int, ...]


def gradient_kernels(inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The kernels of one matrix over n sequences (paper, section 4).

    Args:
        inputs: what goes into it, for each sequence a tensor of shape (tokens, in_dim), of float32 at least.
        gradients: of what comes out of it, (tokens, out_dim) each. A sequence may have no tokens.

    Returns:
        The Adam and the SGD kernel, float64 tensors of shape (n, n) on the CPU.
    """
    adam, sgd = torch.zeros(2, len(inputs), len(inputs), dtype=torch.float64)
    for flat in _formed(inputs, gradients):
        sgd += (flat @ flat.T).cpu()
        adam += (flat @ flat.sign().T).cpu()
    return adam, sgd


def _formed(inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Iterator[Tensor]:
    """The gradients of one matrix over n sequences, some of its rows at a time: (n, rows * in_dim)."""
    n, in_dim, out_dim = len(inputs), inputs[0].shape[1], gradients[0].shape[1]
    rows = max(1, BLOCK_MEMORY // (2 * n * in_dim * inputs[0].element_size()))  # 2: the gradients and their signs
    for start in range(0, out_dim, rows):
        block = inputs[0].new_empty(n, min(rows, out_dim - start), in_dim)
        for x, gradient, formed in zip(inputs, gradients, block, strict=True):
            torch.mm(gradient[:, start : start + rows].T, x, out=formed)
        yield block.flatten(1)


def adam_kernels(weights: FFNWeights, activation: Activation, tokens: TokenGradients) -> tuple[Tensor, ...]:
    """The kernels <grad f(n), sign grad f(m)> of an FFN's projections over sequences n, m (paper, section 4).

    The out-bias, which no scale multiplies, is left out; memory: `BLOCK_MEMORY`, and hidden activations of the tokens.

    Args:
        weights: the FFN's weights.
        activation: its activation function.
        tokens: over n sequences.

    Returns:
        For each in-projection, then for the out-projection, a float64 tensor of shape (n, n) on the CPU.
    """
    inside = look_inside(weights, activation, tokens.inputs.to(weights.out_weight.device))
    x, d = tokens.inputs.to(inside.hidden), tokens.gradients.to(inside.hidden)
    back = d @ weights.out_weight.to(d).T
    kernels = []
    for slope, bias in zip(inside.slopes, weights.in_biases, strict=True):
        seen = x if bias is None else torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        kernels.append(_adam_kernel(seen, slope * back, tokens.counts))
    return (*kernels, _adam_kernel(d, inside.hidden, tokens.counts))


def _adam_kernel(x: Tensor, gradient: Tensor, counts: tuple[int, ...]) -> Tensor:
    kernel = torch.zeros(len(counts), len(counts), dtype=torch.float64)
    for flat in _formed(x.split(counts), gradient.split(counts)):
        kernel += (flat @ flat.sign().T).cpu()
    return kernel
