"""Local search on a partition of rows whose Gram matrix is known: moves of single rows, and exchanges of clusters."""

from __future__ import annotations

import torch
from torch import Tensor

from .reductions import add_rows, cheapest, merge_costs, mutual_pairs, squared_norms_of_sums, sum_by_label

CROWD = 8
"""A sweep may move one row in so many of a cluster; see `refine`."""

NOISE = 8
"""Gains below so many rounding errors are taken for none."""


def refine(gram: Tensor, labels: Tensor, n_clusters: int, max_iter: int) -> Tensor:
    """Lower a clustering's inertia beyond what Lloyd's iteration can reach; no cluster ever gets empty.

    Sweeps of Hartigan's moves until none improves; then exchanges: two clusters merge and a row far from its
    centroid becomes a cluster of its own, where that pays; and again, until neither does.

    Args:
        gram: symmetric tensor of shape (n, n).
        labels: int64 tensor of shape (n,): the start, with no empty cluster.
        n_clusters: the number of clusters c.
        max_iter: the most sweeps, each round of exchanges counted as one.

    Returns:
        int64 tensor of shape (n,).
    """
    state = Partition(gram, labels, n_clusters)
    left = max_iter
    while left > 0:
        left -= _descend(state, left)
        rows, targets = state.exchanges()
        if left <= 0 or len(rows) == 0:
            break
        state.move(rows, targets)
        left -= 1
    return state.labels


def _descend(state: Partition, max_iter: int) -> int:
    """Hartigan's moves until none improves, or `max_iter` sweeps; returns the number of sweeps.

    Each sweep makes the best of the improving moves, at first one in `CROWD` rows of a cluster, though together they
    change centroids; as soon as that does not pay, at most one a cluster, whose gains add exactly.
    """
    crowd, explained = CROWD, state.explained()
    for sweep in range(max_iter):
        rows, targets = state.improving_moves()
        if len(rows) == 0:
            return sweep
        limits = (state.counts // crowd).clamp_(min=1) if crowd else torch.ones_like(state.counts)
        chosen = _within_limits(state.labels[rows], targets, limits)
        state.move(rows[chosen], targets[chosen])
        before, explained = explained, state.explained()
        if explained <= before:
            crowd = 0
    return max_iter


class Partition:
    """A partition of n rows into c clusters: the Gram rows' sums by cluster, and each row's cost of joining a cluster.

    A move computes anew only what it touches: the sums and costs of the clusters that rows leave and join.
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
        """Rows that would better be elsewhere, and where, the largest gain first.

        Moving row i from cluster a to b changes the inertia by n_b / (n_b + 1) d_ib^2 - n_a / (n_a - 1) d_ia^2.
        """
        leaving, noise = self._gains_of_leaving()
        joining, targets = cheapest(self.costs, 0)
        change = joining - leaving
        rows = (change < -noise).nonzero().squeeze(1)
        rows = rows[change[rows].argsort(stable=True)]
        return rows, targets[rows]

    def exchanges(self) -> tuple[Tensor, Tensor]:
        """Moves that merge pairs of clusters and give each freed one to a single row of another, where that pays.

        The cheapest merge goes with the row of the largest gain, and so on; no cluster takes part twice, so that the
        gains add exactly.
        """
        leaving, noise = self._gains_of_leaving()
        cost, nearest = self._merges()
        into = mutual_pairs(nearest)
        into = into[cost[into] < leaving.max()]
        into = into[cost[into].argsort(stable=True)]
        leaving[torch.isin(self.labels, torch.cat([into, nearest[into]]))] = 0
        rows = leaving.argsort(descending=True, stable=True)
        rows = rows[_within_limits(self.labels[rows], self.labels[rows], torch.full_like(self.counts, 2))]
        into, rows = into[: len(rows)], rows[: len(into)]
        pays = leaving[rows] - cost[into] > noise[rows]
        into, rows = into[pays], rows[pays]
        freed = nearest[into]
        target = torch.full_like(self.counts, -1)
        target[freed] = into
        target = target[self.labels]
        merged = (target >= 0).nonzero().squeeze(1)
        return torch.cat([merged, rows]), torch.cat([target[merged], freed])

    def move(self, rows: Tensor, targets: Tensor) -> None:
        """Move the given rows to the given clusters."""
        sources, gram_rows = self.labels[rows], self.gram.index_select(0, rows)
        add_rows(self.sums, sources, gram_rows, sign=-1)
        add_rows(self.sums, targets, gram_rows)
        self.labels[rows] = targets
        self._update(torch.cat([sources, targets]).unique())

    def _update(self, clusters: Tensor) -> None:
        dtype = self.gram.dtype
        self.counts = torch.bincount(self.labels, minlength=len(self.sums))
        self.mean_squares = squared_norms_of_sums(self.sums, self.labels) / self.counts.double().square()
        counts = self.counts[clusters].to(dtype).unsqueeze(1)
        costs = (
            self.sums.index_select(0, clusters)
            .mul_(-2 / counts)
            .add_(self.mean_squares[clusters].to(dtype).unsqueeze(1))
        )
        self.costs.index_copy_(0, clusters, costs.add_(self.squares).mul_(counts / (counts + 1)))
        self.costs[self.labels, self.rows] = torch.inf

    def _gains_of_leaving(self) -> tuple[Tensor, Tensor]:
        """By how much each row's leaving its cluster lowers the inertia, and what of that may be rounding."""
        counts = self.counts[self.labels].to(self.gram.dtype)
        own = self.sums[self.labels, self.rows]
        squares = self.squares + self.mean_squares[self.labels].to(self.gram.dtype)
        gains = (squares - 2 * own / counts) * counts / (counts - 1)
        return torch.where(counts > 1, gains, 0), NOISE * torch.finfo(self.gram.dtype).eps * squares

    def _merges(self) -> tuple[Tensor, Tensor]:
        """For each cluster the cost of its cheapest merge, and with which."""
        inverse = 1 / self.counts.to(self.gram.dtype)
        products = sum_by_label(self.sums.T.contiguous(), self.labels, len(self.counts))
        products *= inverse.unsqueeze(1) * inverse
        every = torch.arange(len(self.counts), device=inverse.device)
        return cheapest(merge_costs(products, self.mean_squares.to(inverse.dtype), inverse, every), 1)


def _within_limits(sources: Tensor, targets: Tensor, limits: Tensor) -> Tensor:
    """Which moves, given best first, to make so that no cluster takes part in more than its limit."""
    clusters = torch.stack([sources, targets], dim=1).flatten()  # still best first
    order = clusters.argsort(stable=True)
    ordered = clusters[order]
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
    return (places < limits[clusters]).view(-1, 2).all(1)
