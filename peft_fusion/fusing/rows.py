"""Operations on an FFN's rows that several methods share: each treats every tensor of the FFN alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .symmetry import balancing_factors, rescale
from .weights import FFNWeights


def check_width(weights: FFNWeights, width: int) -> None:
    """Refuses a width that an FFN cannot have.

    Raises:
        ValueError: if `width` is not in 1 .. `weights.width`.
    """
    if not 1 <= width <= weights.width:
        raise ValueError(f"The width must be between 1 and {weights.width}, but got {width}.")


def map_rows(weights: FFNWeights, function: Callable[[Tensor], Tensor]) -> FFNWeights:
    """The same linear map of rows applied to every tensor that has one row a neuron.

    Args:
        weights: an FFN's weights.
        function: maps a tensor of shape (neurons, dim) to one of shape (other, dim).

    Returns:
        Weights of the FFN whose rows `function` returns; the bias of the out-projection is the same tensor.
    """
    biases = tuple(None if b is None else function(b.unsqueeze(1)).squeeze(1) for b in weights.in_biases)
    ins = tuple(function(w) for w in weights.in_weights)
    return FFNWeights(ins, biases, function(weights.out_weight), weights.out_bias)


def select_rows(weights: FFNWeights, index: Tensor) -> FFNWeights:
    """The FFN of some of the neurons.

    Args:
        weights: an FFN's weights.
        index: int64 tensor of neurons, in the order wanted.

    Returns:
        Weights of `len(index)` neurons (copies).
    """
    return map_rows(weights, lambda rows: rows[index])


def unstack_rows(rows: Tensor, like: FFNWeights) -> FFNWeights:
    """The inverse of `stack_rows`: cuts rows `[w1 | b1 | w2]` into the tensors of an FFN.

    Args:
        rows: tensor of shape (neurons, row_dim), for any number of neurons.
        like: an FFN with the same row dimension; its out-projection's bias is taken over.

    Returns:
        Views of `rows`.
    """
    pieces = iter(rows.split([block.shape[1] for block in like.blocks()], dim=1))
    ins = tuple(next(pieces) for _ in like.in_weights)
    biases = tuple(None if b is None else next(pieces).squeeze(1) for b in like.in_biases)
    return FFNWeights(ins, biases, next(pieces), like.out_bias)


def multiply_effect(weights: FFNWeights, factor: Tensor) -> FFNWeights:
    """Makes each neuron act `factor` times as strongly in the FFN's linear part, by weights alone.

        plain:  sqrt(factor) into w1, b1 and w2      gated:  sqrt(factor) into w_up, b_up and w2

    A plain FFN whose activation is linearised is a sum of products of two weights, w1 and w2, so each takes the
    root. A gated one is, for a given gate, linear in w_up and in w2, and these take it: the gate feeds the
    non-linearity and stays, which makes the function exact and not only its linear part.

    Args:
        weights: an FFN's weights.
        factor: tensor of shape (neurons,), nowhere negative.

    Returns:
        The weights, in the dtype that `weights` and `factor` promote to.
    """
    return rescale(weights, factor.sqrt(), homogeneity=-1)  # divided by root ** -1: multiplied


def balance(weights: FFNWeights, homogeneity: int | None = None) -> FFNWeights:
    """The FFN in coordinates that its symmetries do not change (see `symmetry`), in float32 at least.

    Args:
        weights: an FFN's weights.
        homogeneity: for a plain FFN, its activation's degree of homogeneity; None if it has none.
    """
    factor = balancing_factors(weights, homogeneity)
    if factor is not None:
        weights = rescale(weights, factor, homogeneity or 1)
    dtype = torch.promote_types(weights.out_weight.dtype, torch.float32)
    return map_rows(weights, lambda rows: rows.to(dtype))
