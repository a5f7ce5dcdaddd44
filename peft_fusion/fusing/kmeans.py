"""Kernel k-means: clusters of rows of which only the Gram matrix is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .local_search import lloyd, refine, squared_norms_of_sums, sum_by_label
from .seeding import kmeans_plus_plus, ward


@dataclass(frozen=True)
class Clustering:
    """A partition of n rows into c clusters, none of them empty.

    Args:
        labels: int64 tensor of shape (n,): the cluster of each row, in 0 .. c - 1.
        counts: int64 tensor of shape (c,): the rows in each cluster, at least 1.
        inertia: the sum of the rows' squared distances to their centroids, in the units of the Gram matrix.
    """

    labels: Tensor
    counts: Tensor
    inertia: float


def kernel_kmeans(
    gram: Tensor, n_clusters: int, *, n_init: int = 1, max_iter: int = 100, seed: int = 0
) -> Clustering | list[Clustering]:
    """Cluster rows by k-means, given their Gram matrix (paper, section 4: the fused neurons are k-means centroids).

    The first start is agglomerative (Ward's criterion) and needs no randomness; the others are greedy k-means++
    followed by Lloyd's iterations. Each is then improved by single-row moves beyond what Lloyd can reach, and the
    best is returned. The result depends on nothing but the arguments: not on the number of threads, not on the
    global random state.

    Args:
        gram: symmetric tensor of shape (n, n), as `gram_matrix` returns it; or (b, n, n), clustered one by one.
        n_clusters: the number of clusters c, 1 .. n.
        n_init: the number of starts.
        max_iter: the most sweeps of Lloyd's iteration, and of single-row moves, per start.
        seed: for the starts after the first.

    Returns:
        The clustering of the lowest inertia; a list of b of them for a batch.

    Raises:
        ValueError: if `gram` is not square, holds NaN or infinite values, or `n_clusters` is out of range.
    """
    if gram.dim() == 3:
        return [kernel_kmeans(g, n_clusters, n_init=n_init, max_iter=max_iter, seed=seed) for g in gram]
    _check(gram, n_clusters, n_init)
    gram, scale = _normalised(gram)
    generator = torch.Generator().manual_seed(seed)
    starts = []
    for start in range(n_init):
        if start == 0:
            labels = ward(gram, n_clusters)
        else:
            labels = lloyd(gram, kmeans_plus_plus(gram, n_clusters, generator), n_clusters, max_iter)
        starts.append(_evaluated(gram, refine(gram, labels, n_clusters, max_iter), n_clusters, scale))
    return min(starts, key=lambda clustering: clustering.inertia)


def cluster_means(rows: Tensor, clustering: Clustering) -> Tensor:
    """The centroids of any tensor with one row per clustered row.

    Args:
        rows: tensor of shape (n, d), of any floating dtype.
        clustering: of n rows into c clusters.

    Returns:
        Tensor of shape (c, d) in the dtype of `rows`; summed in float32 at least.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    sums = sum_by_label(rows.to(dtype), clustering.labels.to(rows.device), len(clustering.counts))
    return sums.div_(clustering.counts.to(sums).unsqueeze(1)).to(rows.dtype)


def _check(gram: Tensor, n_clusters: int, n_init: int) -> None:
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"`gram` must have shape (n, n) or (b, n, n); got {tuple(gram.shape)}.")
    if not 1 <= n_clusters <= gram.shape[0]:
        raise ValueError(f"`n_clusters` must be 1 to {gram.shape[0]}, the number of rows; got {n_clusters}.")
    if n_init < 1:
        raise ValueError(f"`n_init` must be at least 1; got {n_init}.")
    low, high = gram.aminmax()
    if not (bool(low.isfinite()) and bool(high.isfinite())):
        raise ValueError("`gram` holds NaN or infinite values; check the weights or the calibration batches.")


def _normalised(gram: Tensor) -> tuple[Tensor, float]:
    """`gram` in a dtype and of a size that leave room for sums, and the factor that was divided out."""
    gram = gram.to(torch.promote_types(gram.dtype, torch.float32))
    scale = float(gram.diagonal().double().mean())
    if scale <= 0 or 1e-15 < scale < 1e15:
        return gram, 1.0
    return gram / scale, scale


def _evaluated(gram: Tensor, labels: Tensor, n_clusters: int, scale: float) -> Clustering:
    counts = torch.bincount(labels, minlength=n_clusters)
    explained = squared_norms_of_sums(sum_by_label(gram, labels, n_clusters), labels) / counts
    inertia = float(gram.diagonal().double().sum() - explained.sum())
    return Clustering(labels, counts, max(inertia, 0.0) * scale)
