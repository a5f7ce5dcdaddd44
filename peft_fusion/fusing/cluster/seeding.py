"""k-means++: where a clustering starts from that does not start from agglomeration."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .ward import DUPLICATE


def kmeans_plus_plus(gram: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++: each new centre is the best of a few drawn in proportion to the squared distances so far.

    Args:
        gram: symmetric tensor of shape (n, n).
        n_clusters: the number of clusters c.
        generator: a CPU generator; the draws are the same for every device.

    Returns:
        int64 tensor of shape (n,): the nearest centre of each row, no cluster empty.
    """
    n, squares = gram.shape[0], gram.diagonal().clone()  # not strided: five times as fast
    trials = 2 + int(math.log(n_clusters))
    draws = torch.rand(n_clusters, trials, generator=generator, dtype=torch.float64).to(gram.device)
    free = torch.ones(n, dtype=torch.bool, device=gram.device)
    nearest = torch.full_like(squares, torch.inf)
    labels = torch.zeros(n, dtype=torch.int64, device=gram.device)
    for cluster in range(n_clusters):
        chance = (nearest if cluster else torch.ones_like(squares)).double().cumsum(0)
        if chance[-1] <= 0:  # fewer distinct rows than centres: any row that is none yet
            chance = free.double().cumsum(0)
        candidates = torch.searchsorted(chance, draws[cluster] * chance[-1], right=True).clamp_(max=n - 1)
        distances = squares[candidates].unsqueeze(1) + squares - 2 * gram[candidates]
        noise = DUPLICATE * torch.finfo(gram.dtype).eps * (squares[candidates].unsqueeze(1) + squares)
        distances = torch.where(distances > noise, distances, 0).minimum(nearest)
        best = distances.sum(1, dtype=torch.float64).argmin()
        centre = candidates[best]
        labels = torch.where(distances[best] < nearest, cluster, labels)
        labels[centre] = cluster
        nearest, free[centre] = distances[best], False
    return labels
