"""The standalone scales that give a narrow FFN the original's tangent kernel under Adam.

With the function fixed, the weights can be held smaller and multiplied by fixed scales in the forward pass: s after
the activation, t_k behind in-projection k. Adam moves every weight by about the learning rate, so the weights'
part of the kernel <grad f, sign grad f> grows by that scale. With d_t the gradient that comes back to the FFN's output
at token t of a sequence,

    out-weights:   the gradient is  sum_t h_it d_t
    in-weights k:  the gradient is  sum_t h'_kit <w2_i, d_t> [x_t | 1]

At first only the gradients' L1 norms are matched: over the tokens the d differ in sign, so |h_i| adds up like its root
mean square, and for a d of no preferred direction |<w2_i, d>| is proportional to |w2_i|. Where the model has gradients,
the kernels of both FFNs are then formed with all narrow FFNs in place, for what goes into an FFN and what comes back to
it change with the others, and each scale is the least-squares factor from the narrow one's kernel to the original's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .activations import Activation, in_chunks, look_inside
from .gradient_kernels import TokenGradients, adam_kernels
from .moments import weighted
from .weights import FFNWeights, NarrowFFN, cast

SEQUENCES = 64
"""The kernel over so many sequences is matched, as far as fewer can tell; of more, the diagonal hardly counts."""

MOST = 4.0
"""How far, as a factor, a scale fitted to few sequences may be from the one of the L1 norms."""


def match_sizes(
    original: FFNWeights,
    narrow: FFNWeights,
    activation: Activation,
    inputs: Tensor,
    token_weights: Tensor | None = None,
) -> NarrowFFN:
    """Splits the weights of a narrow FFN into smaller ones and fixed scales, which match the gradients' L1 norms.

    Args:
        original: the original FFN's weights.
        narrow: the narrow FFN's, of the same function as the result.
        activation: the activation function.
        inputs: tensor of shape (tokens, in_dim) from calibration.
        token_weights: of the inputs, shape (tokens,); None: all 1.

    Returns:
        The narrow FFN with its scales, one number for each projection, in the dtype of `narrow`.
    """
    wide_sizes, narrow_sizes = (_sizes(ffn, activation, inputs, token_weights) for ffn in (original, narrow))
    scales = [wide / max(small, 1e-30) for wide, small in zip(wide_sizes, narrow_sizes, strict=True)]
    return _split(narrow, [scale if scale > 0 else 1.0 for scale in scales])


def fitted_scales(
    narrow: NarrowFFN, kernels: Sequence[Tensor], tokens: TokenGradients, activation: Activation
) -> list[float]:
    """The scales that are least-squares factors from a narrow FFN's kernels to the original's.

    Args:
        narrow: the narrow FFN with the scales of `match_sizes`, from which none moves by more than `MOST`.
        kernels: the original's Adam kernels, of each in-projection and of the out-projection.
        tokens: what the FFN gets when all FFNs are narrow, over the same sequences.
        activation: the activation function.

    Returns:
        A number for each in-projection and one for the out-projection, for `rescaled`.

    Raises:
        ValueError: if it has no scales in front of the activation, hence none that were matched.
    """
    if narrow.in_scales is None:
        raise ValueError("Only scales that match the norms can be fitted: call `match_sizes` first.")
    before = [float(scale[0]) for scale in (*narrow.in_scales, narrow.scale)]
    found = adam_kernels(_folded_exactly(narrow), activation, tokens)
    fits = [_factor(wide, small) for wide, small in zip(kernels, found, strict=True)]
    return [_near(fit, scale) for fit, scale in zip(fits, before, strict=True)]


def rescaled(narrow: NarrowFFN, scales: Sequence[float]) -> NarrowFFN:
    """The same function in the same dtype, with other scales: of every in-projection, then of the out-projection."""
    split = _split(_folded_exactly(narrow), scales)
    return NarrowFFN(cast(split.weights, narrow.weights.out_weight.dtype), split.scale, split.in_scales)


def _folded_exactly(narrow: NarrowFFN) -> FFNWeights:
    """Its function as plain weights, in float32 at least."""
    exact = cast(narrow.weights, torch.promote_types(narrow.weights.out_weight.dtype, torch.float32))
    return NarrowFFN(exact, narrow.scale, narrow.in_scales).folded()


def _split(narrow: FFNWeights, scales: Sequence[float]) -> NarrowFFN:
    """The same function with a scale for each projection, and weights as much smaller."""
    *ins, out = scales
    weights = FFNWeights(
        tuple(w / t for w, t in zip(narrow.in_weights, ins, strict=True)),
        tuple(None if b is None else b / t for b, t in zip(narrow.in_biases, ins, strict=True)),
        narrow.out_weight / out,
        narrow.out_bias,
    )
    ones = narrow.out_weight.new_ones(narrow.width).float()
    return NarrowFFN(weights, ones * out, tuple(ones * t for t in ins))


def _factor(wide: Tensor, small: Tensor) -> float:
    """The least-squares factor from one kernel to another, NaN if there is none.

    The diagonal weighs as little as it does among more sequences: training sees many, and their kernel is almost
    all off its diagonal.
    """
    small, n = small.to(wide.device), len(wide)
    weight = torch.ones_like(wide).fill_diagonal_(min(1.0, (n - 1) / (SEQUENCES - 1))) * small
    return float((weight * wide).sum(dtype=torch.float64) / (weight * small).sum(dtype=torch.float64))


def _near(fit: float, scale: float) -> float:
    """A fitted scale, if it is a number, held near one that needs no fit."""
    return min(max(fit, scale / MOST), scale * MOST) if fit == fit else scale


def _sizes(weights: FFNWeights, activation: Activation, inputs: Tensor, token_weights: Tensor | None) -> list[float]:
    """The L1 norms of the gradients, up to factors that all FFNs of these inputs share: in-projections, then out."""
    norms = weights.out_weight.float().norm(dim=1)
    powers = [torch.zeros_like(norms) for _ in range(len(weights.in_weights) + 1)]
    for x, own in in_chunks(inputs, token_weights):
        inside = look_inside(weights, activation, x)
        for power, values in zip(powers, (*inside.slopes, inside.hidden), strict=True):
            power += weighted(values, own).square().sum(0)
    *slopes, hidden = [(power / max(len(inputs), 1)).sqrt() for power in powers]
    return [*(float((slope * norms).sum()) for slope in slopes), float(hidden.sum())]
