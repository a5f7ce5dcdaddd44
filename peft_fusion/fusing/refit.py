"""The out-projection fitted anew: what the original FFN puts out, from the hidden activations of the narrow one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .metric import out_of_metric
from .moments import Moments, SampleMoments
from .weights import FFNWeights

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Strengths of the ridge to choose from, relative to the second moment of each hidden activation."""

FLOOR = 1e-12
"""The least variance that counts, relative to the second moment: below it lies what float32 activations round off."""


@dataclass(frozen=True)
class Refit:
    """A fitted out-projection.

    Args:
        out_weight: tensor of shape (width, out_dim).
        bias_change: tensor of shape (out_dim,), to be added to the original's bias; None if it has none.
        strength: of the ridge; infinite if nothing was refitted.
        error: the squared error on held-out tokens, relative to the outputs' size.
    """

    out_weight: Tensor
    bias_change: Tensor | None
    strength: float
    error: float


def refit(moments: Moments, prior: Tensor, held_out: SampleMoments) -> Refit:
    """Fits the out-projection by ridge regression, shrunk towards a solution that needs no data.

        minimise over B:  E|y - B^T g|^2 + strength * sum_j E[g_j^2] |B_j - prior_j|^2

    of what is centred, where the moments are about means, for a bias takes these then. The strength is the one of the
    lowest error on held-out tokens; no refit is among the candidates, so that the result is never worse on them. A
    strength whose equations have no unique solution is left out. The minimum does not depend on the metric in whose
    coordinates outputs are given, as every output has weights of its own; the choice of the strength does.

    Args:
        moments: over the tokens to fit to; about means if the FFN has an out-bias to adapt, for none is invented.
        prior: the out-weights without a refit, shape (width, out_dim).
        held_out: over held-out tokens.

    Returns:
        The best fit, in the dtype of `prior`.
    """
    none = Refit(prior, None, float("inf"), held_out.error(prior))
    middle = len(STRENGTHS) // 2
    start = _fit(moments, prior, held_out, STRENGTHS[middle])
    ways = (STRENGTHS[middle + 1 :], STRENGTHS[:middle][::-1])
    fits = [_downhill(moments, prior, held_out, start, way) for way in ways]
    return min([none, *(fit for fit in fits if fit is not None)], key=lambda fit: fit.error)


def _downhill(
    moments: Moments, prior: Tensor, held_out: SampleMoments, start: Refit | None, strengths: Sequence[float]
) -> Refit | None:
    """The last of some strengths before the error grows: it has one minimum, and each strength takes a solution."""
    best = start
    for strength in strengths:
        fit = _fit(moments, prior, held_out, strength)
        if fit is not None and best is not None and fit.error > best.error:
            break
        best = fit or best
    return best


def _fit(moments: Moments, prior: Tensor, held_out: SampleMoments, strength: float) -> Refit | None:
    """The fit with one strength; None if there is no unique one."""
    weight, shift = _solve(moments, prior, strength), None
    if weight is None:
        return None
    if moments.mean is not None and moments.mean_out is not None:
        shift = moments.mean_out - moments.mean @ weight
    return Refit(weight.to(prior), shift, strength, held_out.error(weight, shift))


def with_fit(narrow: FFNWeights, fit: Refit, metric_root: Tensor | None) -> FFNWeights:
    """A narrow FFN with a fitted out-projection.

    Args:
        narrow: its weights; those of the out-projection are replaced.
        fit: in the coordinates of the metric.
        metric_root: of the metric; None: the plain one.
    """
    if fit.strength == float("inf"):
        return narrow
    bias = narrow.out_bias
    if bias is not None and fit.bias_change is not None:
        bias = (bias + out_of_metric(fit.bias_change, metric_root)).to(bias)
    return replace(narrow, out_weight=out_of_metric(fit.out_weight, metric_root), out_bias=bias)


def _solve(moments: Moments, prior: Tensor, strength: float) -> Tensor | None:
    variance = _floored_variance(moments).unsqueeze(1)
    unit = variance.sqrt()
    matrix = (moments.gram / unit).div_(unit.T)  # a unit diagonal: neurons of every size are conditioned alike
    matrix.diagonal().add_(strength)
    columns = matrix.mT  # in the order that LAPACK takes without a copy; the matrix is symmetric
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(columns, out=(columns, info))
    if bool(info):
        return None
    right = torch.addcmul(moments.cross, variance, prior.to(variance), value=strength).div_(unit)
    return torch.cholesky_solve(right, columns).div_(unit)


def _floored_variance(moments: Moments) -> Tensor:
    """Positive also for neurons that are constant or dead; they keep their prior."""
    variance = moments.gram.diagonal()
    power = variance if moments.mean is None else variance + moments.mean.square()
    return torch.maximum(variance, FLOOR * power.clamp(min=0) + 1e-30)
