"""The baseline "mmd": a few particles whose distribution is that of an FFN's neurons."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows import balance, check_width, multiply_effect, unstack_rows
from ..weights import FFNWeights, NarrowFFN, cast, stack_rows

SAMPLE = 2048
"""Rows whose distances the bandwidth is taken from."""


def mmd(
    weights: FFNWeights,
    width: int,
    *,
    steps: int = 100,
    learning_rate: float = 0.1,
    homogeneity: int | None = None,
    seed: int = 0,
) -> NarrowFFN:
    """Particles fitted to an FFN's rows by maximum mean discrepancy (paper, 5.1).

        minimise over y:  mean k(y, y') - 2 mean k(x, y) + mean k(x, x'),    k(x, y) = exp(-|x - y|^2 / h)

    with x the rows `[w1 | b1 | w2]`, y the particles and h the median squared distance of rows. The particles start
    at a random subset of the rows and take Adam's steps. Each stands for neurons / c neurons: the root of that goes
    into both projections (`multiply_effect`).

    Args:
        weights: the FFN's weights.
        width: the number of particles c, from 1 to `weights.width`.
        steps: Adam's steps; their size falls to 0 along a cosine.
        learning_rate: the first step's size, as a fraction of a row entry's root mean square.
        homogeneity: for a plain FFN, its activation's degree of homogeneity (1 for ReLU); None if it has none.
        seed: of the subset that the particles start from.

    Returns:
        The narrow FFN, with a scale of ones, in the dtype of `weights`; at full width, the FFN itself.

    Raises:
        ValueError: if `width` is out of range, or `steps` is negative.
    """
    check_width(weights, width)
    if steps < 0:
        raise ValueError(f"`steps` must be at least 0, but got {steps}.")
    ones = torch.ones(width, device=weights.out_weight.device)
    if width == weights.width:
        return NarrowFFN(weights, ones)
    rows = stack_rows(balance(weights, homogeneity), torch.promote_types(weights.out_weight.dtype, torch.float32))
    generator = torch.Generator().manual_seed(seed)
    start = torch.randperm(weights.width, generator=generator)[:width].sort().values
    particles = fit_particles(rows, rows[start.to(rows.device)], steps, learning_rate)
    share = torch.full_like(ones, weights.width / width)
    narrow = multiply_effect(unstack_rows(particles, weights), share)
    return NarrowFFN(cast(narrow, weights.out_weight.dtype), ones)


def fit_particles(rows: Tensor, start: Tensor, steps: int, learning_rate: float) -> Tensor:
    """Moves particles so that their distribution comes close to that of rows.

    Args:
        rows: tensor of shape (n, d).
        start: the particles, of shape (c, d).
        steps: Adam's steps.
        learning_rate: the first one's size, in units of the root mean square of the rows' entries.

    Returns:
        The particles, of shape (c, d).
    """
    unit = rows.square().mean().sqrt()  # so that neither the step nor Adam's epsilon depends on the rows' size
    if not bool(unit > 0):
        return start
    rows, start = rows / unit, start / unit
    bandwidth = median_squared_distance(rows)
    if bandwidth == 0:  # most rows are the same
        return start * unit
    with torch.enable_grad():
        particles = start.clone().requires_grad_()
        adam = torch.optim.Adam([particles], lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(steps, 1))
        for _ in range(steps):
            (particles.grad,) = torch.autograd.grad(discrepancy(rows, particles, bandwidth), particles)
            adam.step()
            schedule.step()
    return particles.detach() * unit


def discrepancy(rows: Tensor, particles: Tensor, bandwidth: float) -> Tensor:
    """The squared maximum mean discrepancy times c, without the term that does not depend on the particles."""
    own = squared_distances(particles, particles).div(-bandwidth).exp().mean(1).sum()
    return own - 2 * squared_distances(particles, rows).div(-bandwidth).exp().mean(1).sum()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Between the rows of two matrices, shape (len(a), len(b)); by products, hence without a (a, b, d) tensor."""
    squares = a.square().sum(1).unsqueeze(1) + b.square().sum(1)
    return torch.addmm(squares, a, b.T, alpha=-2).clamp(min=0)


def median_squared_distance(rows: Tensor) -> float:
    """The median over all pairs of (at most `SAMPLE`, evenly spaced) rows."""
    sample = rows[:: -(-len(rows) // SAMPLE)]
    upper = torch.triu_indices(len(sample), len(sample), 1, device=rows.device)
    return squared_distances(sample, sample)[upper[0], upper[1]].median().item() if len(sample) > 1 else 0.0
