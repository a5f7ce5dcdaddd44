"""What `fusing` works on: the weights of one FFN, seen as a bundle of one-neuron sub-MLPs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FFNWeights:
    """An FFN's weights, one row a neuron (paper, section 3: the FFN as a sum of sub-MLPs).

    Row `i` of every tensor belongs to neuron `i`, so that selecting, permuting or averaging neurons is the
    same operation on each of them. With `act` the activation function the FFN computes

        plain:  out_bias + sum_i act(in_weights[0][i] @ x + in_biases[0][i]) * out_weight[i]
        gated:  out_bias + sum_i act(in_weights[0][i] @ x + ...) * (in_weights[1][i] @ x + ...) * out_weight[i]

    Args:
        in_weights: one (plain) or two (gated, the activated one first) tensors of shape (neurons, in_dim).
        in_biases: for each in-projection its bias of shape (neurons,), or None.
        out_weight: tensor of shape (neurons, out_dim): the out-projection, transposed.
        out_bias: tensor of shape (out_dim,), or None. It belongs to no neuron.
    """

    in_weights: tuple[Tensor, ...]
    in_biases: tuple[Tensor | None, ...]
    out_weight: Tensor
    out_bias: Tensor | None

    @property
    def width(self) -> int:
        """The number of neurons."""
        return self.out_weight.shape[0]

    @property
    def gated(self) -> bool:
        """Whether the FFN has two in-projections, the first of which gates the second."""
        return len(self.in_weights) == 2

    def blocks(self) -> list[Tensor]:
        """The pieces of every neuron's row `[w1 | b1 | w2]`, each of shape (neurons, dim); views, no copies."""
        biases = [b.unsqueeze(1) for b in self.in_biases if b is not None]
        return [*self.in_weights, *biases, self.out_weight]


@dataclass(frozen=True)
class NarrowFFN:
    """A narrower FFN and the standalone, non-trainable scale of its hidden activations.

    It computes `out_bias + sum_j scale[j] * act(...)_j * out_weight[j]` over its own neurons.

    Args:
        weights: the narrow FFN's weights, `width` rows.
        scale: tensor of shape (width,): the paper's diag(P); it multiplies the hidden activations.
        in_scales: for each in-projection a tensor of shape (width,) that multiplies what it puts out, bias included;
            None where there are none.
    """

    weights: FFNWeights
    scale: Tensor
    in_scales: tuple[Tensor, ...] | None = None

    def folded(self) -> FFNWeights:
        """The same function as plain weights: the scales multiplied into the projections."""
        w, dtype = self.weights, self.weights.out_weight.dtype
        ins, biases = w.in_weights, w.in_biases
        if self.in_scales is not None:
            pairs = list(zip(ins, biases, self.in_scales, strict=True))
            ins = tuple(weight * scale.to(dtype).unsqueeze(1) for weight, _, scale in pairs)
            biases = tuple(None if bias is None else bias * scale.to(dtype) for _, bias, scale in pairs)
        return FFNWeights(ins, biases, w.out_weight * self.scale.to(dtype).unsqueeze(1), w.out_bias)


def stack_rows(weights: FFNWeights, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every neuron's parameters as one row `[w1 | b1 | w2]`, shape (neurons, row_dim), in `dtype` (a copy)."""
    return torch.cat([block.to(dtype) for block in weights.blocks()], dim=1)


def cast(weights: FFNWeights, dtype: torch.dtype) -> FFNWeights:
    """The weights in another dtype."""
    ins = tuple(w.to(dtype) for w in weights.in_weights)
    biases = tuple(None if b is None else b.to(dtype) for b in weights.in_biases)
    return FFNWeights(ins, biases, weights.out_weight.to(dtype), weights.out_bias)
