"""Which neurons stand for all: by what each puts out, by cluster, or by what the others cannot make up for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

SHRINKAGE = 3.0
"""Ridge in `eliminate`, relative to each neuron's second moment: how far correlations are trusted on other text."""

ROUNDS = 24
"""Rounds in which `eliminate` removes neurons."""

ROWS = 512
"""Rows of a matrix that are moved at once."""


def most_salient(saliency: Tensor, width: int) -> Tensor:
    """The neurons that put out most: the largest E[h_i^2] |w2_i|^2, in their original order.

    Args:
        saliency: tensor of shape (neurons,), the diagonal of the output kernel.
        width: how many.

    Returns:
        int64 tensor of shape (width,).
    """
    return saliency.argsort(descending=True, stable=True)[:width].sort().values


def most_salient_of_each(saliency: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """The most salient neuron of every cluster.

    Args:
        saliency: tensor of shape (neurons,).
        labels: int64 tensor of shape (neurons,): the cluster of each.
        clusters: how many clusters there are, none of them empty.

    Returns:
        int64 tensor of shape (clusters,), in the order of the clusters.
    """
    order = saliency.argsort(descending=True, stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)
    first = torch.full((clusters,), len(order), device=order.device)
    return order[first.scatter_reduce_(0, labels, position, "amin")]


def eliminate(second_moment: Tensor, out_weight: Tensor, width: int) -> Tensor:
    """Removes, round by round, the neurons whose outputs the remaining ones make up for best.

    With A the inverse of the (shrunk) second moment and w_q the refitted out-weights, removing neuron q and fitting
    the others anew raises the squared error by |w_q|^2 / A_qq (the optimal brain surgeon's rule for a whole
    neuron). Each round removes the cheapest few and brings A and w up to date exactly.

    Float32 will do: the raised diagonal keeps the eigenvalues of what is inverted, at a unit diagonal, above 3/4.

    Args:
        second_moment: E[h h^T], tensor of shape (neurons, neurons); overwritten, as there is no room for two. It is
            computed in its dtype.
        out_weight: tensor of shape (neurons, out_dim).
        width: how many neurons are to be left.

    Returns:
        int64 tensor of shape (width,): those left, in their original order.
    """
    left = torch.arange(len(second_moment), device=second_moment.device)
    for left in eliminations(second_moment, out_weight, _schedule(len(second_moment), width)):  # noqa: B007
        pass
    return left


def eliminations(second_moment: Tensor, out_weight: Tensor, counts: Iterable[int]) -> Iterator[Tensor]:
    """The neurons that `eliminate` leaves after each of its rounds.

    Args:
        second_moment: E[h h^T], tensor of shape (neurons, neurons); overwritten.
        out_weight: tensor of shape (neurons, out_dim).
        counts: how many neurons are left after each round, descending.

    Yields:
        int64 tensors of shape (count,): those left, in their original order.
    """
    inverse = _shrunk_inverse(second_moment)
    weights, left = out_weight.to(inverse.dtype, copy=True), torch.arange(len(inverse), device=inverse.device)
    for remaining in counts:
        cost = weights.square().sum(1) / inverse.diagonal()
        dead = cost.argsort(stable=True)[: len(left) - remaining]
        kept = torch.ones_like(left, dtype=torch.bool).index_fill_(0, dead, False).nonzero().squeeze(1)
        rows = inverse.index_select(0, dead)
        root = torch.linalg.cholesky(rows[:, dead])  # what goes is taken out as the block inverse has it
        factors, moved = (
            torch.linalg.solve_triangular(root, part, upper=False) for part in (rows[:, kept], weights[dead])
        )
        inverse = _only(kept, inverse).addmm_(factors.T, factors, alpha=-1)
        weights, left = weights[kept].addmm_(factors.T, moved, alpha=-1), left[kept]
        yield left


def _only(kept: Tensor, matrix: Tensor) -> Tensor:
    """Some rows and columns of a square matrix, given by ascending numbers, moved to its beginning: no second one."""
    for start in range(0, len(kept), ROWS):  # what is read lies at or behind what is written
        rows = matrix.index_select(0, kept[start : start + ROWS])
        matrix[start : start + len(rows), : len(kept)] = rows.index_select(1, kept)
    return matrix[: len(kept), : len(kept)]


def _shrunk_inverse(moment: Tensor) -> Tensor:
    """The inverse of a second moment with its diagonal raised, in its place."""
    diagonal = moment.diagonal()
    diagonal.add_(SHRINKAGE * diagonal + 1e-8 * diagonal.mean() + 1e-30)
    columns = moment.mT  # in the order that LAPACK takes without a copy; the matrix is symmetric
    torch.linalg.cholesky(columns, out=columns)
    torch.cholesky_inverse(columns, out=columns)
    return moment


def _schedule(neurons: int, width: int) -> list[int]:
    """How many neurons are left after each round: about the same fraction goes in every one."""
    fractions = [(width / neurons) ** (step / ROUNDS) for step in range(1, ROUNDS + 1)]
    counts = sorted({max(width, round(neurons * fraction)) for fraction in fractions}, reverse=True)
    return [count for count in counts if count < neurons]
