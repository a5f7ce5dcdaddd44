"""The out-projection fitted anew: what the original FFN puts out, from the hidden activations of the narrow one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .metric import in_metric

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Strengths of the ridge that are tried, relative to the second moment of each hidden activation."""

FLOOR = 1e-12
"""The least variance that counts, relative to the second moment: below it lies what float32 activations round off."""

CHUNK = 512
"""Tokens whose values are held in float64 at a time."""


@dataclass(frozen=True)
class Moments:
    """Means and covariances of narrow hidden activations and of the original's outputs.

    Args:
        gram: E[(g - E g) (g - E g)^T] of the narrow hidden activations g, shape (width, width).
        cross: E[(g - E g) (y - E y)^T] with the original's outputs y (without its bias), shape (width, out_dim).
        mean: E[g], shape (width,).
        mean_out: E[y], shape (out_dim,).
    """

    gram: Tensor
    cross: Tensor
    mean: Tensor
    mean_out: Tensor

    def with_means(self) -> tuple[Tensor, Tensor]:
        """E[g g^T] and E[g y^T], what is to be explained where no bias takes the means."""
        return torch.addr(self.gram, self.mean, self.mean), torch.addr(self.cross, self.mean, self.mean_out)


@dataclass(frozen=True)
class SampleMoments(Moments):
    """The moments of some tokens, all that the error of any out-projection on them depends on.

    Args:
        power: E|y - E y|^2.
    """

    power: float

    def error(self, out_weight: Tensor, shift: Tensor | None = None) -> float:
        """E|out_weight^T g + shift - y|^2 / E|y|^2, without running a token through it.

        Args:
            out_weight: tensor of shape (width, out_dim).
            shift: tensor of shape (out_dim,), or None.
        """
        weight = out_weight.to(self.gram)
        missed = ((self.gram @ weight - 2 * self.cross) * weight).sum() + self.power
        apart = self.mean @ weight - self.mean_out
        if shift is not None:
            apart = apart + shift.to(weight)
        size = self.power + float(self.mean_out.square().sum())
        return max(0.0, float(missed + apart.square().sum())) / max(size, 1e-30)


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


def moments_of_kept(covariance: Tensor, mean: Tensor, out_weight: Tensor, kept: Tensor) -> Moments:
    """The moments of an FFN of which some neurons are kept: parts of what calibration accumulated.

    Args:
        covariance: of the original's hidden activations h, shape (neurons, neurons).
        mean: E[h], shape (neurons,).
        out_weight: the original's out-weights, shape (neurons, out_dim).
        kept: int64 tensor of the kept neurons.
    """
    rows = covariance[kept].double()
    w = out_weight.double()
    mean = mean.double()
    return Moments(rows[:, kept], rows @ w, mean[kept], mean @ w)


def moments_of_sample(hidden: Tensor, outputs: Tensor) -> SampleMoments:
    """The moments of any narrow FFN, from its hidden activations (tokens, width) and the original's outputs.

    The sums are in float64, which leaves of a small error, a difference of larger ones, what float32 tokens hold.
    """
    width, out_dim, count = hidden.shape[1], outputs.shape[1], max(len(hidden), 1)
    gram, cross = (hidden.new_zeros(width, n, dtype=torch.float64) for n in (width, out_dim))
    mean, mean_out = (value.sum(0, dtype=torch.float64) / count for value in (hidden, outputs))
    power = 0.0
    for g, y in zip(hidden.split(CHUNK), outputs.split(CHUNK), strict=True):
        g, y = g - mean, y - mean_out
        gram.addmm_(g.T, g)
        cross.addmm_(g.T, y)
        power += float(y.square().sum())
    return SampleMoments(gram / count, cross / count, mean, mean_out, power / count)


def _floored(diagonal: Tensor, moments: Moments) -> Tensor:
    """The diagonal of a gram, positive also for neurons that are constant or dead; they keep their prior."""
    power = moments.gram.diagonal() + moments.mean.square()
    return torch.maximum(diagonal, FLOOR * power.clamp(min=0) + 1e-30)


def refit(
    moments: Moments, prior: Tensor, held_out: SampleMoments, with_bias: bool, metric_root: Tensor | None = None
) -> Refit:
    """Fits the out-projection by ridge regression, shrunk towards a solution that needs no data.

        minimise over B:  E|y - B^T g|^2 + strength * sum_j E[g_j^2] |B_j - prior_j|^2

    (of what is centred, where a bias takes the means). The strength is the one of the lowest error on held-out tokens;
    no refit is among the candidates, so that the result is never worse on them. A strength whose equations have no
    unique solution is left out. The minimum does not depend on the metric in which errors are measured, as every
    output has weights of its own; the choice of the strength does.

    Args:
        moments: over the tokens to fit to.
        prior: the out-weights without a refit, shape (width, out_dim).
        held_out: over held-out tokens, with the original's outputs in the metric's coordinates.
        with_bias: whether the FFN has an out-bias to adapt; none is invented.
        metric_root: of the metric in which errors are measured; None: the plain one.

    Returns:
        The best fit.
    """
    gram, cross = (moments.gram, moments.cross) if with_bias else moments.with_means()
    diagonal = _floored(gram.diagonal(), moments)
    unit = diagonal.sqrt()
    normal = gram / torch.outer(unit, unit)  # a unit diagonal: neurons of every size are conditioned alike

    def solve(strength: float, cross: Tensor, start: Tensor) -> Tensor | None:
        matrix = normal.clone()
        matrix.diagonal().add_(strength)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed):
            return None
        right = torch.addcmul(cross, diagonal.unsqueeze(1), start, value=strength) / unit.unsqueeze(1)
        return torch.cholesky_solve(right, factor) / unit.unsqueeze(1)

    def shift(weight: Tensor, mean_out: Tensor) -> Tensor | None:
        return mean_out - moments.mean @ weight if with_bias else None

    start = prior.double()
    seen_start, seen_cross, seen_mean = (in_metric(value, metric_root) for value in (start, cross, moments.mean_out))
    best, error = float("inf"), held_out.error(seen_start)
    for strength in STRENGTHS:  # in the metric's coordinates, which the solution may be turned to before or after
        weight = solve(strength, seen_cross, seen_start)
        found = float("inf") if weight is None else held_out.error(weight, shift(weight, seen_mean))
        if found < error:
            best, error = strength, found
    weight = None if best == float("inf") else solve(best, cross, start)
    if weight is None:
        return Refit(start, None, best, error)
    return Refit(weight, shift(weight, moments.mean_out), best, error)
