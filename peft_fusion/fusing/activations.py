"""What goes on inside an FFN on given inputs: hidden activations and their derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from .weights import FFNWeights

Activation = Callable[[Tensor], Tensor]

CHUNK = 512
"""Tokens that are looked at together where there may be many: what is inside takes many times their memory."""


@dataclass(frozen=True)
class Inside:
    """An FFN's inner values on some tokens.

    Args:
        hidden: tensor of shape (tokens, neurons): what goes into the out-projection.
        slopes: for each in-projection a tensor of shape (tokens, neurons): the derivative of `hidden` by what the
            in-projection puts out.
    """

    hidden: Tensor
    slopes: tuple[Tensor, ...]


def look_inside(weights: FFNWeights, activation: Activation, inputs: Tensor) -> Inside:
    """Runs an FFN's in-projections and activation.

    Args:
        weights: the FFN's weights.
        activation: the activation function, elementwise.
        inputs: tensor of shape (tokens, in_dim).

    Returns:
        Hidden activations and slopes, in float32 at least.
    """
    dtype = torch.promote_types(weights.out_weight.dtype, torch.float32)
    x = inputs.to(dtype)
    pairs = zip(weights.in_weights, weights.in_biases, strict=True)
    z = [x @ w.to(dtype).T + (0 if b is None else b.to(dtype)) for w, b in pairs]
    with torch.enable_grad():
        first = z[0].detach().requires_grad_()
        activated = activation(first)
        (slope,) = torch.autograd.grad(activated.sum(), first)
    activated = activated.detach()
    if not weights.gated:
        return Inside(activated, (slope,))
    return Inside(activated * z[1], (slope * z[1], activated))


def look_by_parts(weights: FFNWeights, activation: Activation, inputs: Tensor) -> Iterator[Inside]:
    """`look_inside` for some tokens at a time."""
    return (look_inside(weights, activation, part) for part in inputs.split(CHUNK))


def run(narrow: FFNWeights, activation: Activation, inputs: Tensor) -> Tensor:
    """What an FFN of these weights puts out, differentiably.

    Args:
        narrow: the FFN's weights, scales folded in.
        activation: its activation function, elementwise.
        inputs: tensor of shape (..., in_dim).

    Returns:
        Tensor of shape (..., out_dim), in float32 at least.
    """
    dtype = torch.promote_types(narrow.out_weight.dtype, torch.float32)
    x = inputs.to(dtype)
    pairs = zip(narrow.in_weights, narrow.in_biases, strict=True)
    z = [linear(x, w.to(dtype), None if b is None else b.to(dtype)) for w, b in pairs]
    hidden = activation(z[0]) * z[1] if narrow.gated else activation(z[0])
    bias = None if narrow.out_bias is None else narrow.out_bias.to(dtype)
    return linear(hidden, narrow.out_weight.T.to(dtype), bias)
