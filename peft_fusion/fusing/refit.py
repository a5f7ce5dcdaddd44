"""The out-projection fitted anew: what the original FFN puts out, from the hidden activations of the narrow one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .held_out import HeldOut
from .metric import out_of_metric
from .moments import Moments
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


@dataclass(frozen=True)
class Problem:
    """What an out-projection is fitted to, shrunk towards and judged by.

    Args:
        moments: over the tokens to fit to; about means if the FFN has an out-bias to adapt, for none is invented.
        prior: the out-weights without a refit, shape (width, out_dim).
        held_out: the held-out tokens.
    """

    moments: Moments
    prior: Tensor
    held_out: HeldOut

    def fit(self, strength: float) -> Refit | None:
        """The fit with one strength; None if there is no unique one."""
        moments, shift = self.moments, None
        weight = _solve(moments, self.prior, strength)
        if weight is None:
            return None
        if moments.mean is not None and moments.mean_out is not None:
            shift = moments.mean_out - moments.mean @ weight
        return Refit(weight.to(self.prior), shift, strength, self.held_out.error(weight, shift))

    @cached_property
    def unfitted(self) -> Refit:
        """The out-projection as it is."""
        return Refit(self.prior, None, float("inf"), self.held_out.error(self.prior))

    @cached_property
    def middle(self) -> Refit | None:
        """The fit with the middle one of the strengths."""
        return self.fit(STRENGTHS[len(STRENGTHS) // 2])

    @property
    def promise(self) -> float:
        """An error that it reaches, by which problems are compared before all strengths are tried."""
        return min(fit.error for fit in (self.unfitted, self.middle) if fit is not None)


def refit(problem: Problem) -> Refit:
    """Fits the out-projection by ridge regression, shrunk towards a solution that needs no data.

        minimise over B:  E|y - B^T g|^2 + strength * sum_j E[g_j^2] |B_j - prior_j|^2

    of what is centred, where the moments are about means, for a bias takes these then. The strength is the one of the
    lowest error on held-out tokens; no refit is among the candidates, so that the result is never worse on them. A
    strength whose equations have no unique solution is left out. The minimum does not depend on the metric in whose
    coordinates outputs are given, as every output has weights of its own; the choice of the strength does.

    Args:
        problem: what to fit to.

    Returns:
        The best fit, in the dtype of the prior.
    """
    middle = len(STRENGTHS) // 2
    ways = (STRENGTHS[middle + 1 :], STRENGTHS[:middle][::-1])
    fits = [_downhill(problem, way) for way in ways]
    return min([problem.unfitted, *(fit for fit in fits if fit is not None)], key=lambda fit: fit.error)


def _downhill(problem: Problem, strengths: Sequence[float]) -> Refit | None:
    """The last of some strengths before the error grows: it has one minimum, and each strength takes a solution."""
    best = problem.middle
    for strength in strengths:
        fit = problem.fit(strength)
        if fit is not None and best is not None and fit.error > best.error:
            break
        best = fit or best
    return best


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
