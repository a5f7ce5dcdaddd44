"""What an FFN computes on given inputs: its outputs, its hidden activations and their derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .weights import FFNWeights, NarrowFFN


@dataclass(frozen=True)
class Combination:
    """What lies between the projections of an FFN where it is not known to be an activation times a factor.

    Args:
        function: maps what the in-projections put out, one or two (tokens, neurons), to the hidden activations;
            elementwise.
    """

    function: Callable[[Sequence[Tensor]], Tensor]


Activation = Callable[[Tensor], Tensor] | Combination
"""The activation function, elementwise; in a gated FFN the second piece multiplies what it gives."""

CHUNK = 256
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


def run(ffn: FFNWeights | NarrowFFN, activation: Activation, inputs: Tensor) -> Tensor:
    """What an FFN puts out, without dropout; differentiable.

    Args:
        ffn: an FFN's weights, or those of a narrow one with its scales.
        activation: the activation function, elementwise.
        inputs: tensor of shape (..., in_dim), on the device of the weights.

    Returns:
        Tensor of shape (..., out_dim), in float32 at least.
    """
    weights = ffn.weights if isinstance(ffn, NarrowFFN) else ffn
    hidden = hidden_activations(ffn, activation, inputs)
    bias = None if weights.out_bias is None else weights.out_bias.to(hidden)
    return linear(hidden, weights.out_weight.to(hidden).T, bias)


def hidden_activations(ffn: FFNWeights | NarrowFFN, activation: Activation, inputs: Tensor) -> Tensor:
    """What goes into an FFN's out-projection, of a narrow one with its scales.

    Args:
        ffn: an FFN's weights, or those of a narrow one with its scales.
        activation: the activation function, elementwise.
        inputs: tensor of shape (tokens, in_dim), on the device of the weights.

    Returns:
        Tensor of shape (tokens, neurons), in float32 at least.
    """
    weights, in_scales = (ffn.weights, ffn.in_scales) if isinstance(ffn, NarrowFFN) else (ffn, None)
    hidden = _hidden(weights, activation, inputs.to(_at_least_float32(weights)), in_scales)
    return hidden * ffn.scale.to(hidden) if isinstance(ffn, NarrowFFN) else hidden


def look_inside(weights: FFNWeights, activation: Activation, inputs: Tensor) -> Inside:
    """An FFN's hidden activations and their slopes.

    Args:
        weights: the FFN's weights.
        activation: the activation function, elementwise.
        inputs: tensor of shape (tokens, in_dim), on the device of the weights.

    Returns:
        Both in float32 at least.
    """
    x = inputs.to(_at_least_float32(weights))
    first, *others = _before(weights, x)
    if isinstance(activation, Combination):
        return _look_inside_of(activation, (first, *others))
    with torch.enable_grad():
        first = first.detach().requires_grad_()
        activated = activation(first)
        (slope,) = torch.autograd.grad(activated.sum(), first)
    activated = activated.detach()
    if not others:
        return Inside(activated, (slope,))
    return Inside(activated * others[0], (slope * others[0], activated))


def _look_inside_of(combination: Combination, pieces: Sequence[Tensor]) -> Inside:
    with torch.enable_grad():
        pieces = [piece.detach().requires_grad_() for piece in pieces]
        hidden = combination.function(pieces)
        slopes = torch.autograd.grad(hidden.sum(), pieces)
    return Inside(hidden.detach(), slopes)


def in_chunks(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Tensors of as many tokens, the first of them at least, `CHUNK` tokens at a time; None stays None."""
    count = len(tensors[0]) if tensors[0] is not None else 0
    for start in range(0, count, CHUNK):
        yield tuple(None if tensor is None else tensor[start : start + CHUNK] for tensor in tensors)


def _hidden(
    weights: FFNWeights, activation: Activation, x: Tensor, in_scales: tuple[Tensor, ...] | None = None
) -> Tensor:
    first, *others = _before(weights, x)
    if in_scales is not None:
        first, *others = (z * scale.to(z) for z, scale in zip((first, *others), in_scales, strict=True))
    if isinstance(activation, Combination):
        return activation.function((first, *others))
    hidden = activation(first)
    return hidden * others[0] if others else hidden


def _before(weights: FFNWeights, x: Tensor) -> list[Tensor]:
    """What the in-projections put out, in the dtype of `x`."""
    pairs = zip(weights.in_weights, weights.in_biases, strict=True)
    return [linear(x, weight.to(x), None if bias is None else bias.to(x)) for weight, bias in pairs]


def _at_least_float32(weights: FFNWeights) -> torch.dtype:
    return torch.promote_types(weights.out_weight.dtype, torch.float32)
