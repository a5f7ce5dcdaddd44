"""Local searches that lower a clustering's inertia, given the rows' Gram matrix: Lloyd's and Hartigan's."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32
"""Clusters per group when each row's cheapest cluster is sought: see `_cheapest`."""

CROWD = 8
"""A sweep may move one row in so many of a cluster; see `refine`."""

NOISE = 8
"""Gains below so many rounding errors are taken for none."""


def lloyd(gram: Tensor, labels: Tensor, n_clusters: int, max_iter: int) -> Tensor:
    """Lloyd's iterations: exactly the labels that they give on the rows themselves (no cluster gets empty).

    Args:
        gram: symmetric tensor of shape (n, n).
        labels: int64 tensor of shape (n,): the start, with no empty cluster.
        n_clusters: the number of clusters c.
        max_iter: the most iterations.

    Returns:
        int64 tensor of shape (n,).
    """
    for _ in range(max_iter):
        counts = torch.bincount(labels, minlength=n_clusters)
        sums = sum_by_label(gram, labels, n_clusters)  # (c, n)
        mean_squares = squared_norms_of_sums(sums, labels) / counts.double().square()
        costs = sums.mul_((-2 / counts.to(gram.dtype)).unsqueeze(1)).add_(
            mean_squares.to(gram.dtype).unsqueeze(1)
        )
        moved = _keep_occupied(_cheapest(costs)[1], labels, n_clusters)
        if torch.equal(moved, labels):
            break
        labels = moved
    return labels


def refine(gram: Tensor, labels: Tensor, n_clusters: int, max_iter: int) -> Tensor:
    """Hartigan's search: move single rows to another cluster while that lowers the inertia.

    Moving row i from cluster a to b changes the inertia by n_b / (n_b + 1) d_ib^2 - n_a / (n_a - 1) d_ia^2, which
    can be negative where Lloyd's iteration is stuck. Each sweep makes the best of the improving moves at once, at
    most one in `CROWD` rows of a cluster, since together they change centroids; as soon as that no longer pays, at
    most one a cluster, whose gains add exactly. No cluster ever gets empty.

    Args:
        gram: symmetric tensor of shape (n, n).
        labels: int64 tensor of shape (n,): the start, with no empty cluster.
        n_clusters: the number of clusters c.
        max_iter: the most sweeps.

    Returns:
        int64 tensor of shape (n,).
    """
    state = _Partition(gram, labels, n_clusters)
    crowd, explained = CROWD, state.explained()
    for _ in range(max_iter):
        rows, targets = state.improving_moves()
        if len(rows) == 0:
            break
        limits = (state.counts // crowd).clamp_(min=1) if crowd else torch.ones_like(state.counts)
        chosen = _within_limits(state.labels[rows], targets, limits)
        state.move(rows[chosen], targets[chosen])
        before, explained = explained, state.explained()
        if explained <= before:
            crowd = 0
    return state.labels


def sum_by_label(values: Tensor, labels: Tensor, n_clusters: int) -> Tensor:
    """Each cluster's sum of `values` (n, ...) -> (c, ...), the same bits on every run and device."""
    out = values.new_zeros(n_clusters, *values.shape[1:])
    return _add_rows(out, labels, values)


def squared_norms_of_sums(sums: Tensor, labels: Tensor) -> Tensor:
    """Each cluster's squared norm of the sum of its rows, float64 (c,), from `sums` (c, n) of Gram rows."""
    own = sums.gather(0, labels.unsqueeze(0)).squeeze(0)
    return sum_by_label(own.double(), labels, len(sums))


def _add_rows(out: Tensor, index: Tensor, values: Tensor, sign: int = 1) -> Tensor:
    if out.device.type == "cpu":
        return out.index_add_(0, index, values, alpha=sign)
    return out.index_put_(
        (index,), values * sign, accumulate=True
    )  # index_add_ is not deterministic elsewhere


class _Partition:
    """A partition under single-row moves: the Gram rows' sums by cluster, and every row's cost of joining a cluster.

    Only what a move touches is computed anew: the sums and costs of the clusters that it leaves and joins.
    """

    def __init__(self, gram: Tensor, labels: Tensor, n_clusters: int) -> None:
        self.gram, self.labels = gram, labels.clone()
        self.squares = gram.diagonal().clone()  # (n,)
        self.rows = torch.arange(len(labels), device=gram.device)
        self.sums = sum_by_label(gram, labels, n_clusters)  # (c, n)
        self.costs = torch.empty_like(self.sums)
        self._update(torch.arange(n_clusters, device=gram.device))

    def explained(self) -> float:
        """The squared norms that the centroids account for: the rows' total less the inertia."""
        return float((self.mean_squares * self.counts).sum())

    def improving_moves(self) -> tuple[Tensor, Tensor]:
        """Rows that would better be elsewhere, and where, the largest gain first."""
        counts, mean_squares = self.counts[self.labels].to(self.gram.dtype), self.mean_squares[self.labels]
        own = self.sums[self.labels, self.rows]
        squares = self.squares + mean_squares.to(self.gram.dtype)
        leaving = torch.where(
            counts > 1, (squares - 2 * own / counts) * counts / (counts - 1).clamp(min=1), 0
        )
        joining, targets = _cheapest(self.costs)
        change = joining - leaving
        rows = (change < -NOISE * torch.finfo(self.gram.dtype).eps * squares).nonzero().squeeze(1)
        rows = rows[change[rows].argsort(stable=True)]
        return rows, targets[rows]

    def move(self, rows: Tensor, targets: Tensor) -> None:
        """Move the given rows to the given clusters."""
        sources, gram_rows = self.labels[rows], self.gram[rows]
        _add_rows(self.sums, sources, gram_rows, sign=-1)
        _add_rows(self.sums, targets, gram_rows)
        self.labels[rows] = targets
        self._update(torch.cat([sources, targets]).unique())

    def _update(self, clusters: Tensor) -> None:
        dtype = self.gram.dtype
        self.counts = torch.bincount(self.labels, minlength=len(self.sums))
        self.mean_squares = squared_norms_of_sums(self.sums, self.labels) / self.counts.double().square()
        counts = self.counts[clusters].to(dtype).unsqueeze(1)
        costs = self.sums[clusters].mul_(-2 / counts).add_(self.mean_squares[clusters].to(dtype).unsqueeze(1))
        self.costs[clusters] = costs.add_(self.squares).mul_(counts / (counts + 1))
        self.costs[self.labels, self.rows] = torch.inf


def _cheapest(costs: Tensor) -> tuple[Tensor, Tensor]:
    """Each column's minimum over the rows of `costs` (c, n), and where: the first if there are several.

    `min` over a group of rows is vectorised where `argmin` is not: so first the best group, then the best within it.
    """
    c, n = costs.shape
    whole = c - c % GROUP
    if whole == 0:
        return costs.min(0)
    groups = costs[:whole].view(-1, GROUP, n)
    best = groups.amin(1).min(0).indices
    value, within = groups[best, :, torch.arange(n, device=costs.device)].min(1)
    index = best * GROUP + within
    if whole < c:
        rest = costs[whole:].min(0)
        index = torch.where(rest.values < value, rest.indices + whole, index)
        value = torch.minimum(rest.values, value)
    return value, index


def _within_limits(sources: Tensor, targets: Tensor, limits: Tensor) -> Tensor:
    """Which moves, given best first, to make so that no cluster takes part in more than its limit."""
    clusters = torch.stack([sources, targets], dim=1).flatten()  # still best first
    order = clusters.argsort(stable=True)
    ordered = clusters[order]
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
    return (places < limits[clusters]).view(-1, 2).all(1)


def _keep_occupied(labels: Tensor, before: Tensor, n_clusters: int) -> Tensor:
    """`labels`, with the first former row of each cluster that would get empty put back."""
    n = len(labels)
    rows = torch.arange(n, device=labels.device)
    first = torch.full((n_clusters,), n, device=labels.device).scatter_reduce_(0, before, rows, "amin")
    while len(empty := (torch.bincount(labels, minlength=n_clusters) == 0).nonzero().squeeze(1)):
        labels[first[empty]] = empty
    return labels
