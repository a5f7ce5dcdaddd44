"""The standalone scales that give a narrow FFN the original's tangent kernel under Adam.

With the function fixed, the weights can be held smaller and multiplied by fixed scales in the forward pass: s after
the activation, t_k behind in-projection k. Adam moves every weight by about the learning rate, so the weights'
part of the kernel <grad f, sign grad f> grows by that scale. With d the gradient that comes back to the FFN's output,

    out-weights:   the gradient is h_i d,                 its L1 norm   sum_i |h_i| |d|_1
    in-weights k:  the gradient is h'_ki <w2_i, d> x,     its L1 norm   sum_i |h'_ki| |<w2_i, d>| |x|_1

Over the tokens of a sentence the d differ in sign, so |h_i| adds up like its root mean square; and for a d of no
preferred direction |<w2_i, d>| is proportional to |w2_i|. The scales are the original's sums over the narrow one's.
"""

from __future__ import annotations

from torch import Tensor

from .activations import Activation, look_inside
from .weights import FFNWeights, NarrowFFN


def match_tangent_kernel(original: FFNWeights, narrow: FFNWeights, activation: Activation, inputs: Tensor) -> NarrowFFN:
    """Splits the weights of a narrow FFN into smaller ones and fixed scales, the function unchanged.

    Args:
        original: the original FFN's weights.
        narrow: the narrow FFN's, of the same function as the result.
        activation: the activation function.
        inputs: tensor of shape (tokens, in_dim) from calibration.

    Returns:
        The narrow FFN with its scales, in the dtype of `narrow`.
    """
    wide_sizes, narrow_sizes = _sizes(original, activation, inputs), _sizes(narrow, activation, inputs)
    ratios = [wide / max(small, 1e-30) for wide, small in zip(wide_sizes, narrow_sizes, strict=True)]
    *ins, out = [ratio if ratio > 0 else 1.0 for ratio in ratios]
    weights = FFNWeights(
        tuple(w / t for w, t in zip(narrow.in_weights, ins, strict=True)),
        tuple(None if b is None else b / t for b, t in zip(narrow.in_biases, ins, strict=True)),
        narrow.out_weight / out,
        narrow.out_bias,
    )
    ones = narrow.out_weight.new_ones(narrow.width).float()
    return NarrowFFN(weights, ones * out, tuple(ones * t for t in ins))


def _sizes(weights: FFNWeights, activation: Activation, inputs: Tensor) -> list[float]:
    """The L1 norms of the gradients, up to factors that all FFNs of these inputs share: in-projections, then out."""
    inside = look_inside(weights, activation, inputs)
    norms = weights.out_weight.float().norm(dim=1)
    sizes = [float((_rms(slope) * norms).sum()) for slope in inside.slopes]
    return [*sizes, float(_rms(inside.hidden).sum())]


def _rms(values: Tensor) -> Tensor:
    """The root mean square of every column."""
    return values.square().mean(0).sqrt()
