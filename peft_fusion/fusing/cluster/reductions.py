"""Sums over clusters and minima of matrices, fast and the same bits on every run."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64
"""Entries per group when a minimum is sought: see `cheapest`."""


def merge_costs(products: Tensor, squares: Tensor, inverse: Tensor, part: Tensor) -> Tensor:
    """What merging clusters costs: n_a n_b / (n_a + n_b) |m_a - m_b|^2 (Ward's criterion), infinite for a = b.

    Args:
        products: tensor of shape (p, c): the inner products of the means of clusters `part` with all; overwritten.
        squares: tensor of shape (c,): the squared norms of the means.
        inverse: tensor of shape (c,): 1 / n_a.
        part: int64 tensor of shape (p,).
    """
    costs = products.mul_(-2)
    costs += squares[part].unsqueeze(1) + squares  # summed first, so that the costs are exactly symmetric
    costs /= inverse[part].unsqueeze(1) + inverse
    costs[torch.arange(len(part), device=part.device), part] = torch.inf
    return costs


def mutual_pairs(nearest: Tensor) -> Tensor:
    """The first of each pair of clusters that are each other's nearest."""
    clusters = torch.arange(len(nearest), device=nearest.device)
    return ((nearest[nearest] == clusters) & (clusters < nearest)).nonzero().squeeze(1)


def cheapest(costs: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The minimum of a matrix along `dim`, and where: the first if there are several.

    `amin` over a group is vectorised where `min` with its index is not: first the best group, then the best in it.
    """
    size = costs.shape[dim]
    whole = size - size % GROUP
    if whole == 0:
        return costs.min(dim)
    groups = costs.narrow(dim, 0, whole).unflatten(dim, (-1, GROUP))
    best = groups.amin(dim + 1).min(dim).indices
    every = torch.arange(len(best), device=costs.device)
    value, within = (groups[every, best] if dim else groups[best, :, every]).min(1)
    index = best * GROUP + within
    if whole < size:
        rest = costs.narrow(dim, whole, size - whole).min(dim)
        index = torch.where(rest.values < value, rest.indices + whole, index)
        value = torch.minimum(rest.values, value)
    return value, index


def sum_by_label(values: Tensor, labels: Tensor, n_clusters: int) -> Tensor:
    """Each cluster's sum of `values` (n, ...) -> (c, ...), the same bits on every run."""
    return add_rows(values.new_zeros(n_clusters, *values.shape[1:]), labels, values)


def squared_norms_of_sums(sums: Tensor, labels: Tensor) -> Tensor:
    """Each cluster's squared norm of the sum of its rows, float64 (c,), from its sum of Gram rows `sums` (c, n)."""
    own = sums.gather(0, labels.unsqueeze(0)).squeeze(0)
    return sum_by_label(own.double(), labels, len(sums))


def first_rows(labels: Tensor, n_clusters: int) -> Tensor:
    """The index of each cluster's first row, int64 (c,)."""
    rows = torch.arange(len(labels), device=labels.device)
    return rows.new_full((n_clusters,), len(labels)).scatter_reduce_(0, labels, rows, "amin")


def add_rows(out: Tensor, index: Tensor, values: Tensor, sign: int = 1) -> Tensor:
    """Adds row i of `values` to row `index[i]` of `out`, or subtracts it, the same bits on every run."""
    if out.device.type == "cpu":
        return out.index_add_(0, index, values, alpha=sign)
    return out.index_put_((index,), values * sign, accumulate=True)  # sorts; index_add_ is not deterministic there
