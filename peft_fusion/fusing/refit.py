"""The out-projection fitted anew: what the original FFN puts out, from the hidden activations of the narrow one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Strengths of the ridge that are tried, relative to the second moment of each hidden activation."""

CHUNK = 512
"""Tokens whose values are held in float64 at a time."""


@dataclass(frozen=True)
class Moments:
    """Second moments of narrow hidden activations with themselves and with the original's outputs.

    Args:
        own: E[g g^T] of the narrow hidden activations g, shape (width, width).
        cross: E[g y^T] with the original's outputs y (without its bias), shape (width, out_dim).
        mean: E[g], shape (width,).
        mean_out: E[y], shape (out_dim,).
    """

    own: Tensor
    cross: Tensor
    mean: Tensor
    mean_out: Tensor

    def centred(self) -> Moments:
        """The covariances: what is left to explain once a bias takes the means."""
        own = self.own - torch.outer(self.mean, self.mean)
        return Moments(own, self.cross - torch.outer(self.mean, self.mean_out), self.mean, self.mean_out)


@dataclass(frozen=True)
class SampleMoments(Moments):
    """The moments of some tokens, all that the error of any out-projection on them depends on.

    Args:
        power: E|y|^2.
    """

    power: float

    def error(self, out_weight: Tensor, shift: Tensor | None = None) -> float:
        """E|out_weight^T g + shift - y|^2 / E|y|^2, without running a token through it.

        Args:
            out_weight: tensor of shape (width, out_dim).
            shift: tensor of shape (out_dim,), or None.
        """
        weight = out_weight.to(self.own)
        missed = ((self.own @ weight - 2 * self.cross) * weight).sum() + self.power
        if shift is not None:
            bias = shift.to(weight)
            missed = missed + bias @ (bias + 2 * (self.mean @ weight - self.mean_out))
        return max(0.0, float(missed)) / max(self.power, 1e-30)


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


def moments_of_kept(second_moment: Tensor, mean: Tensor, out_weight: Tensor, kept: Tensor) -> Moments:
    """The moments of an FFN of which some neurons are kept: parts of what calibration accumulated.

    Args:
        second_moment: E[h h^T] of the original, shape (neurons, neurons).
        mean: E[h], shape (neurons,).
        out_weight: the original's out-weights, shape (neurons, out_dim).
        kept: int64 tensor of the kept neurons.
    """
    rows = second_moment[kept].double()
    w = out_weight.double()
    mean = mean.double()
    return Moments(rows[:, kept], rows @ w, mean[kept], mean @ w)


def moments_of_sample(hidden: Tensor, outputs: Tensor) -> SampleMoments:
    """The moments of any narrow FFN, from its hidden activations (tokens, width) and the original's outputs.

    The sums are in float64, which leaves of a small error, a difference of larger ones, what float32 tokens hold.
    """
    width, out_dim, count = hidden.shape[1], outputs.shape[1], max(len(hidden), 1)
    own, cross = (hidden.new_zeros(width, n, dtype=torch.float64) for n in (width, out_dim))
    power = 0.0
    for g, y in zip(hidden.split(CHUNK), outputs.split(CHUNK), strict=True):
        g, y = g.double(), y.double()
        own.addmm_(g.T, g)
        cross.addmm_(g.T, y)
        power += float(y.square().sum())
    mean, mean_out = hidden.mean(0, dtype=torch.float64), outputs.mean(0, dtype=torch.float64)
    return SampleMoments(own / count, cross / count, mean, mean_out, power / count)


def seen(weight: Tensor, root: Tensor | None) -> Tensor:
    """Out-weights or a bias (..., out_dim) in the coordinates of a metric's root (out_dim, out_dim); None: as it is.

    Turning the weights is much cheaper than turning what they put out for every token.
    """
    return weight if root is None else weight @ root.to(weight)


def refit(
    moments: Moments, prior: Tensor, held_out: SampleMoments, with_bias: bool, root: Tensor | None = None
) -> Refit:
    """Fits the out-projection by ridge regression, shrunk towards a solution that needs no data.

        minimise over B:  E|y - B^T g|^2 + strength * sum_j E[g_j^2] |B_j - prior_j|^2

    The strength is the one of the lowest error on held-out tokens; no refit is among the candidates, so that the
    result is never worse on them. The minimum does not depend on the metric in which errors are measured, as every
    output has weights of its own; the choice of the strength does.

    Args:
        moments: over the tokens to fit to.
        prior: the out-weights without a refit, shape (width, out_dim).
        held_out: over held-out tokens, with the original's outputs in the metric's coordinates.
        with_bias: whether the FFN has an out-bias to adapt; none is invented.
        root: of the metric in which errors are measured; None: the plain one.

    Returns:
        The best fit.
    """
    used = moments.centred() if with_bias else moments
    diagonal = used.own.diagonal().clamp(min=1e-12 * float(used.own.diagonal().mean()) + 1e-30)
    unit = diagonal.sqrt()
    normal = used.own / torch.outer(unit, unit)  # a unit diagonal: neurons of every size are conditioned alike

    def solve(strength: float, cross: Tensor, start: Tensor) -> Tensor:
        matrix = normal.clone()
        matrix.diagonal().add_(strength)
        right = torch.addcmul(cross, diagonal.unsqueeze(1), start, value=strength) / unit.unsqueeze(1)
        return torch.cholesky_solve(right, torch.linalg.cholesky(matrix)) / unit.unsqueeze(1)

    def shift(weight: Tensor, mean_out: Tensor) -> Tensor | None:
        return mean_out - moments.mean @ weight if with_bias else None

    start = prior.double()
    seen_start, seen_cross, seen_mean = (seen(value, root) for value in (start, used.cross, moments.mean_out))
    best, error = float("inf"), held_out.error(seen_start)
    for strength in STRENGTHS:  # in the metric's coordinates, which the solution may be turned to before or after
        weight = solve(strength, seen_cross, seen_start)
        found = held_out.error(weight, shift(weight, seen_mean))
        if found < error:
            best, error = strength, found
    if best == float("inf"):
        return Refit(start, None, best, error)
    weight = solve(best, used.cross, start)
    return Refit(weight, shift(weight, moments.mean_out), best, error)
