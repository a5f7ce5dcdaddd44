"""Agglomeration by Ward's criterion, given the rows' Gram matrix: where a clustering starts from."""

from __future__ import annotations

import torch
from torch import Tensor

from .reductions import cheapest, merge_costs, mutual_pairs, sum_by_label

DUPLICATE = 64
"""Rows whose squared distance is below so many rounding errors of their squared norms are taken for equal."""

LOOKS = 32
"""How many clusters look for their cheapest merge after each merge, if there are so many; see `_Forest`."""


def ward(gram: Tensor, n_clusters: int) -> Tensor:
    """Agglomerative clustering by Ward's criterion: merging a and b costs n_a n_b / (n_a + n_b) |m_a - m_b|^2.

    In each round all pairs that are each other's nearest merge. Equal rows merge before all others, so that where
    clusters suffice for the distinct rows the inertia is zero.

    Args:
        gram: symmetric tensor of shape (n, n).
        n_clusters: the number of clusters c.

    Returns:
        int64 tensor of shape (n,): labels, no cluster empty.
    """
    labels = _merge_duplicates(gram)
    surplus = int(labels.max()) + 1 - n_clusters
    if surplus <= 0:
        return _split(labels, -surplus)
    forest = _Forest(gram, labels)
    while surplus:
        surplus -= forest.merge(surplus)
    return forest.labels.unique(return_inverse=True)[1]


def _merge_duplicates(gram: Tensor) -> Tensor:
    """Labels 0 .. g - 1, one for each distinct row: that of the first row equal to it."""
    squares = gram.diagonal().clone()
    noise = DUPLICATE * torch.finfo(gram.dtype).eps
    leaders = torch.arange(len(gram), device=gram.device)
    tile = _tile(gram)
    for start, rows in zip(range(0, len(gram), tile), gram.split(tile), strict=True):
        own = leaders[start : start + tile]  # a view: written below
        margins = (squares[start : start + tile].unsqueeze(1) + squares).mul_(1 - noise).sub_(rows, alpha=2)
        margins.diagonal(start).fill_(torch.inf)
        repeated = (margins.amin(1) <= 0).nonzero().squeeze(1)
        if len(repeated):
            own[repeated] = (margins[repeated] <= 0).to(torch.uint8).argmax(1).minimum(own[repeated])
    return leaders[leaders].unique(return_inverse=True)[1]


def _split(labels: Tensor, surplus: int) -> Tensor:
    """Give `surplus` rows that share a label with an earlier row a label of their own."""
    order = labels.argsort(stable=True)
    repeated = torch.zeros_like(labels, dtype=torch.bool)
    repeated[order[1:]] = labels[order[1:]] == labels[order[:-1]]
    rows = repeated.nonzero().squeeze(1)[:surplus]
    fresh = torch.arange(len(rows), device=labels.device) + int(labels.max()) + 1
    return labels.index_copy(0, rows, fresh)


def _tile(gram: Tensor) -> int:
    """Rows of n values to work on at a time: what fits a core's cache, or keeps a GPU busy."""
    return max(1, (2**18 if gram.device.type == "cpu" else 2**26) // gram.shape[0])


class _Forest:
    """Clusters being merged: what each merge would cost, and with which each one's is cheapest.

    The costs of joining a merged cluster follow from those of joining its parts (`_joined`), so that a merge writes
    the rows and columns that it changes and the others are only read. A merged cluster is no cheaper to join than the
    cheaper of its parts was: the cheapest changes only for clusters whose cheapest was merged, and what it cost bounds
    what they will find when they look again. Where many have the same cheapest, a few that look first suffice for the
    next merges: those with the lowest bounds. Clusters merged into others stay in place, infinitely far, until enough
    of them are there to make dropping them worth a copy.

    `nearest` is with which cluster each one's cheapest merge is, and itself for those that have to look (again).
    """

    def __init__(self, gram: Tensor, labels: Tensor) -> None:
        self.labels = labels
        self.counts = torch.bincount(labels).to(gram.dtype)
        self.penalty = torch.zeros_like(self.counts)  # on all costs; infinite for what was merged into another
        if len(self.counts) < len(labels):
            gram = sum_by_label(sum_by_label(gram, labels, len(self.counts)).T.contiguous(), labels, len(self.counts))
            gram /= self.counts * self.counts.unsqueeze(1)
            self.costs = gram
        else:
            self.costs = gram.clone()
        squares, inverse = self.costs.diagonal().clone(), 1 / self.counts
        every = torch.arange(len(self.counts), device=gram.device)
        tile = _tile(self.costs)
        for rows, part in zip(self.costs.split(tile), every.split(tile), strict=True):
            merge_costs(rows, squares, inverse, part)
        self.cost, self.nearest = torch.empty_like(squares), every.clone()
        self._look(every)

    def merge(self, limit: int) -> int:
        """Merge the pairs that are each other's cheapest, at most `limit`, cheapest first; returns how many."""
        into, gone = self._mutual_pairs(limit)
        relabel = torch.arange(len(self.counts), device=into.device)
        relabel[gone] = into
        self.labels = relabel[self.labels]
        self._combine(into, gone)
        touched = torch.zeros_like(self.penalty, dtype=torch.bool)
        touched[into] = touched[gone] = True
        self.nearest = torch.where(touched[self.nearest], torch.arange(len(touched), device=into.device), self.nearest)
        alive = self.penalty == 0
        if int(alive.sum()) < 0.8 * len(alive):
            self._compact(alive.nonzero().squeeze(1))
        self._look(self._waiting()[: LOOKS * len(into)])
        return len(into)

    def _waiting(self) -> Tensor:
        """The clusters that have to look for their cheapest merge, the lowest bounds first."""
        every = torch.arange(len(self.nearest), device=self.nearest.device)
        waiting = ((self.nearest == every) & (self.penalty == 0)).nonzero().squeeze(1)
        return waiting[self.cost[waiting].argsort(stable=True)]

    def _mutual_pairs(self, limit: int) -> tuple[Tensor, Tensor]:
        into = self._alive_pairs()
        while len(into) == 0 and len(waiting := self._waiting()):
            self._look(waiting[:LOOKS])
            into = self._alive_pairs()
        if len(into) == 0:  # ties that a device breaks at random could chase each other round
            into = self.cost.argmin().unsqueeze(0)
        into = into[self.cost[into].argsort(stable=True)][:limit]
        return into, self.nearest[into]

    def _alive_pairs(self) -> Tensor:
        into = mutual_pairs(self.nearest)
        return into[self.penalty[into] == 0]

    def _combine(self, into: Tensor, gone: Tensor) -> None:
        own, (first, second) = self.costs[into, gone].unsqueeze(1), self.counts[torch.stack([into, gone])].unsqueeze(2)
        rows = _joined(
            self.costs.index_select(0, into), self.costs.index_select(0, gone), own, first, second, self.counts
        )
        self.counts[into] += self.counts[gone]
        mutual = _joined(rows[:, into], rows[:, gone], own.T, first.T, second.T, self.counts[into].unsqueeze(1))
        rows[:, into] = (mutual + mutual.T) / 2  # the two orders of merging differ by rounding
        self.costs.index_copy_(0, into, rows)
        self.costs.scatter_(1, into.expand(len(self.costs), -1), rows.T)  # twice as fast as `costs[:, into] = rows.T`
        self.cost[gone] = self.penalty[gone] = torch.inf

    def _compact(self, kept: Tensor) -> None:
        """Drop all clusters but `kept`, within the memory that they have: a row never moves past one still unread."""
        place = torch.full_like(self.nearest, -1)
        place[kept] = torch.arange(len(kept), device=kept.device)
        self.labels = place[self.labels]
        packed = self.costs.view(-1)[: len(kept) ** 2].view(len(kept), len(kept))
        tile = _tile(self.costs)
        for rows, out in zip(kept.split(tile), packed.split(tile), strict=True):
            out.copy_(self.costs.index_select(0, rows).index_select(1, kept))
        self.costs = packed
        self.counts, self.cost, self.penalty = self.counts[kept], self.cost[kept], self.penalty[kept]
        self.nearest = place[self.nearest[kept]]

    def _look(self, clusters: Tensor) -> None:
        """Has clusters look for their cheapest merge."""
        for part in clusters.split(_tile(self.costs)):
            self.cost[part], self.nearest[part] = cheapest(self.costs.index_select(0, part).add_(self.penalty), 1)


def _joined(a: Tensor, b: Tensor, apart: Tensor, n_a: Tensor, n_b: Tensor, n: Tensor) -> Tensor:
    """What joining the union of clusters a and b costs others (Lance and Williams, 1967); overwrites `a` and `b`.

    Args:
        a: what joining a costs each of the others.
        b: the same of b.
        apart: what merging a and b costs.
        n_a: the rows in a.
        n_b: the rows in b.
        n: the rows in each of the others.
    """
    return a.mul_(n_a + n).add_(b.mul_(n_b + n)).sub_(apart * n).div_(n_a + n_b + n)
