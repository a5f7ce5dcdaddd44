"""The out-projection fitted anew: what the original FFN puts out, from the hidden activations of the narrow one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Strengths of the ridge that are tried, relative to the second moment of each hidden activation."""


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
class Refit:
    """A fitted out-projection.

    Args:
        out_weight: tensor of shape (width, out_dim).
        bias_change: tensor of shape (out_dim,), to be added to the original's bias; None if it has none.
        strength: of the ridge; infinite if nothing was refitted.
        error: the `relative_error` on held-out tokens.
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


def moments_of_sample(hidden: Tensor, outputs: Tensor) -> Moments:
    """The moments of any narrow FFN, from its hidden activations (tokens, width) and the original's outputs."""
    g, y, count = hidden.double(), outputs.double(), max(len(hidden), 1)
    return Moments(g.T @ g / count, g.T @ y / count, g.mean(0), y.mean(0))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The squared error of outputs, relative to their size; both tensors of shape (tokens, out_dim)."""
    return float((found - expected).square().sum() / expected.square().sum().clamp(min=1e-30))


def seen(weight: Tensor, root: Tensor | None) -> Tensor:
    """Out-weights or a bias (..., out_dim) in the coordinates of a metric's root (out_dim, out_dim); None: as it is.

    Turning the weights is much cheaper than turning what they put out for every token.
    """
    return weight if root is None else weight @ root.to(weight)


def refit(
    moments: Moments,
    prior: Tensor,
    hidden: Tensor,
    outputs: Tensor,
    with_bias: bool,
    root: Tensor | None = None,
) -> Refit:
    """Fits the out-projection by ridge regression, shrunk towards a solution that needs no data.

        minimise over B:  E|y - B^T g|^2 + strength * sum_j E[g_j^2] |B_j - prior_j|^2

    The strength is the one of the lowest error on held-out tokens; no refit is among the candidates, so that the
    result is never worse on them. The minimum does not depend on the metric in which errors are measured, as every
    output has weights of its own; the choice of the strength does.

    Args:
        moments: over the tokens to fit to.
        prior: the out-weights without a refit, shape (width, out_dim).
        hidden: the narrow hidden activations on held-out tokens, shape (tokens, width).
        outputs: the original's outputs on them, without its bias, in the metric's coordinates, (tokens, out_dim).
        with_bias: whether the FFN has an out-bias to adapt; none is invented.
        root: of the metric in which errors are measured; None: the plain one.

    Returns:
        The best fit.
    """
    g, y, start = hidden.double(), outputs.double(), prior.double()
    used = moments.centred() if with_bias else moments
    diagonal = used.own.diagonal().clamp(min=1e-12 * float(used.own.diagonal().mean()) + 1e-30)
    unit = diagonal.sqrt()
    normal = used.own / torch.outer(unit, unit)  # a unit diagonal: neurons of every size are conditioned alike
    best: Refit | None = None
    for strength in (float("inf"), *STRENGTHS):
        weight = start
        if strength != float("inf"):
            right = (used.cross + strength * diagonal.unsqueeze(1) * start) / unit.unsqueeze(1)
            matrix = normal + strength * torch.eye(len(unit), dtype=normal.dtype, device=normal.device)
            weight = torch.cholesky_solve(right, torch.linalg.cholesky(matrix)) / unit.unsqueeze(1)
        shift = moments.mean_out - moments.mean @ weight if with_bias and strength != float("inf") else None
        found = g @ seen(weight, root)
        error = relative_error(found if shift is None else found + seen(shift, root), y)
        if best is None or error < best.error:
            best = Refit(weight, shift, strength, error)
    assert best is not None
    return best
