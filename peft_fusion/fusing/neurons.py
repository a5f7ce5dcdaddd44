"""Which neurons stand for all: by what each puts out, by cluster, or by what the others cannot make up for."""

from __future__ import annotations

import torch
from torch import Tensor

SHRINKAGE = 3.0
"""Ridge in `eliminate`, relative to each neuron's second moment: how far correlations are trusted on other text."""

ROUNDS = 24
"""Rounds in which `eliminate` removes neurons."""


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

    Args:
        second_moment: E[h h^T], tensor of shape (neurons, neurons).
        out_weight: tensor of shape (neurons, out_dim).
        width: how many neurons are to be left.

    Returns:
        int64 tensor of shape (width,): those left, in their original order.
    """
    inverse = _shrunk_inverse(second_moment)
    weights, live = out_weight.double(), torch.arange(len(inverse), device=inverse.device)
    for remaining in _schedule(len(live), width):
        cost = weights.square().sum(1) / inverse.diagonal()
        order = cost.argsort(stable=True)
        dead, kept = order[: len(live) - remaining], order[len(live) - remaining :].sort().values
        # inverse[dead, dead]^-1 times the rows of what goes, as the block inverse has it
        rows = inverse[dead]
        solved = torch.linalg.solve(rows[:, dead], torch.cat([rows[:, kept], weights[dead]], dim=1))
        across = rows[:, kept].T
        weights = weights[kept].addmm_(across, solved[:, len(kept) :], alpha=-1)
        inverse = inverse[kept[:, None], kept].addmm_(across, solved[:, : len(kept)], alpha=-1)
        live = live[kept]
    return live


def _shrunk_inverse(second_moment: Tensor) -> Tensor:
    """The inverse, in float64, of a second moment with its diagonal raised."""
    moment = second_moment.to(torch.float64, copy=True)
    diagonal = moment.diagonal()
    diagonal.add_(SHRINKAGE * diagonal + 1e-8 * diagonal.mean() + 1e-30)
    return torch.cholesky_inverse(torch.linalg.cholesky(moment, out=moment))


def _schedule(neurons: int, width: int) -> list[int]:
    """How many neurons are left after each round: about the same fraction goes in every one."""
    fractions = [(width / neurons) ** (step / ROUNDS) for step in range(1, ROUNDS + 1)]
    counts = sorted({max(width, round(neurons * fraction)) for fraction in fractions}, reverse=True)
    return [count for count in counts if count < neurons]
