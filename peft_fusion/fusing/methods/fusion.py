"""The method of the paper: the narrow FFN of the centroids (Wei et al., ICML 2023, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cluster.gram import gram_matrix
from ..cluster.kmeans import Clustering, cluster_means, kernel_kmeans
from ..rows import check_width, map_rows
from ..symmetry import balancing_factors, rescale
from ..weights import FFNWeights, NarrowFFN, cast


def fuse(
    weights: FFNWeights,
    width: int,
    *,
    homogeneity: int | None = None,
    n_init: int | None = None,
    max_iter: int | None = None,
    seed: int = 0,
) -> NarrowFFN:
    """Clusters an FFN's neurons by their parameters and replaces each cluster by its centroid.

        fused(x) = W2c (P * act(W1c x + b1c)) + b2,    P = the clusters' sizes

    equals the FFN in which every neuron is replaced by its cluster's centroid. P is not folded into W2c: under
    Adam every weight moves by about the learning rate, so a centroid that stands for n neurons has to act n times
    as strongly for the training dynamics to stay the same.

    Args:
        weights: the FFN's weights.
        width: the number of centroids, from 1 to `weights.width`.
        homogeneity: for a plain FFN, its activation's degree of homogeneity (1 for ReLU); None if it has none.
        n_init: restarts of the clustering; None for the engine's default.
        max_iter: iterations of the clustering; None for the engine's default.
        seed: makes the clustering repeatable.

    Returns:
        The narrow FFN, in the dtype of `weights`; at full width, the FFN itself.

    Raises:
        ValueError: if `width` is out of range.
    """
    check_width(weights, width)
    if width == weights.width:
        return NarrowFFN(weights, torch.ones(width, device=weights.out_weight.device))
    factor = balancing_factors(weights, homogeneity)
    balanced = weights if factor is None else rescale(weights, factor, homogeneity or 1)
    gram = gram_matrix(balanced.blocks())
    clustering = kernel_kmeans(gram, width, n_init=n_init, max_iter=max_iter, seed=seed)
    narrow = centroids(weights, clustering, homogeneity)
    return NarrowFFN(cast(narrow.weights, weights.out_weight.dtype), narrow.scale)


def centroids(weights: FFNWeights, clustering: Clustering, homogeneity: int | None = None) -> NarrowFFN:
    """The narrow FFN in which every neuron is replaced by its cluster's mean, in balanced coordinates.

    Args:
        weights: the FFN's weights.
        clustering: of its neurons.
        homogeneity: for a plain FFN, its activation's degree of homogeneity (1 for ReLU); None if it has none.

    Returns:
        The centroids, with their cluster's typical size and, as scale, the clusters' sizes.
    """
    factor = balancing_factors(weights, homogeneity)
    if factor is None:
        return NarrowFFN(average(weights, clustering), clustering.counts.float())
    means = average(rescale(weights, factor, homogeneity or 1), clustering)
    typical = rescale(means, 1 / typical_factor(factor, clustering), homogeneity or 1)
    return NarrowFFN(typical, clustering.counts.float())


def average(weights: FFNWeights, clustering: Clustering) -> FFNWeights:
    """The clusters' centroids: every tensor averaged over the neurons of a cluster.

    Args:
        weights: an FFN's weights.
        clustering: of its neurons.

    Returns:
        Weights of as many neurons as there are clusters; the bias of the out-projection is the same tensor.
    """
    return map_rows(weights, lambda rows: cluster_means(rows, clustering))


def typical_factor(factor: Tensor, clustering: Clustering) -> Tensor:
    """The geometric mean of each cluster's balancing factors, shape (clusters,); positive."""
    return cluster_means(factor.abs().log().unsqueeze(1), clustering).squeeze(1).exp()
