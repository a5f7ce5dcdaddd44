"""Fusion that knows what goes through the FFN: cluster by it, refit to it, scale by it."""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import Activation, look_inside
from .cluster.kmeans import Clustering, kernel_kmeans
from .kernels import find_kernel
from .known import KnownFFN, known_ffn
from .methods import find_method
from .methods.fusion import average, typical_factor
from .methods.pruning import norm_products
from .metric import in_metric
from .neurons import eliminate, most_salient, most_salient_of_each
from .recipe import Recipe
from .refit import Moments, SampleMoments, moments_of_kept, moments_of_sample, refit
from .rows import check_width, select_rows
from .scales import match_sizes
from .statistics import FFNStatistics
from .symmetry import balancing_factors, rescale
from .weights import FFNWeights, NarrowFFN, cast


def fuse_calibrated(
    weights: FFNWeights,
    width: int,
    statistics: FFNStatistics,
    activation: Activation,
    recipe: Recipe,
    homogeneity: int | None = None,
) -> NarrowFFN:
    """A narrow FFN that does on the calibration inputs what the original does.

    With `recipe.kernel` "fisher" every error of an output is measured in that metric. Where real neurons stand for
    clusters, what each FFN gets is decided by the error on held-out tokens, between the most salient neuron of every
    cluster, the neurons left by `eliminate` and the most salient ones.

    Args:
        weights: the FFN's weights.
        width: the number of neurons, from 1 to `weights.width`.
        statistics: what calibration found out about it.
        activation: its activation function.
        recipe: how, settled; of a method that can be calibrated.
        homogeneity: for a plain FFN, its activation's degree of homogeneity; None if it has none.

    Returns:
        The narrow FFN, in the dtype of `weights`. Scales "ntk" match the sizes of gradients (`match_sizes`); they are
        to be fitted (`fit_scales`) once all FFNs are narrow.

    Raises:
        ValueError: if `width` is out of range, the method or the kernel is none that can be used here, the statistics
            are of an FFN of another shape, or hold no gradients for the kernel "fisher".
    """
    check_width(weights, width)
    method, kernel = find_method(recipe.method), find_kernel(recipe.kernel)
    if recipe.kernel not in method.kernels or not method.calibrated:
        raise ValueError(f'`kernel="{recipe.kernel}"` is nothing that `method="{recipe.method}"` is calibrated with.')
    known = known_ffn(weights, statistics, activation, homogeneity, with_metric=kernel.needs_gradients)
    if "centroid" not in method.representatives:
        saliency = known.saliency if kernel.needs_statistics else norm_products(weights)
        narrow = _best_of([most_salient(saliency, width)], known, recipe.refit)
    else:
        settings = {"n_init": recipe.n_init, "max_iter": recipe.max_iter}
        clustering = kernel_kmeans(kernel.between(known), width, seed=recipe.seed, **settings)
        if recipe.representative == "neuron":
            narrow = _best_of(_candidates(known, clustering, width), known, recipe.refit)
        else:
            narrow = _centroids(known, clustering, recipe.refit)
    if recipe.scale == "ntk":
        narrow = match_sizes(known.weights, narrow.folded(), activation, known.inputs)
    return NarrowFFN(cast(narrow.weights, weights.out_weight.dtype), narrow.scale, narrow.in_scales)


def _candidates(known: KnownFFN, clustering: Clustering, width: int) -> list[Tensor]:
    """Choices of real neurons to decide between."""
    return [
        most_salient_of_each(known.saliency, clustering.labels, width).sort().values,
        eliminate(known.second_moment, known.seen_weight, width),
        most_salient(known.saliency, width),
    ]


def _best_of(candidates: list[Tensor], known: KnownFFN, how: str) -> NarrowFFN:
    """The narrow FFN of those real neurons that come closest to the original on held-out tokens."""
    device = known.second_moment.device
    covariance, mean = known.statistics.covariance.to(device), known.statistics.mean.to(device)

    def fitted(kept: Tensor) -> tuple[FFNWeights, float]:
        narrow = select_rows(known.weights, kept)
        moments = moments_of_kept(covariance, mean, known.weights.out_weight, kept)
        held_out = moments_of_sample(known.hidden[:, kept], known.seen_outputs)
        return _refitted(narrow, moments, held_out, known.metric_root, how)

    best, _ = min(map(fitted, candidates), key=lambda found: found[1])  # one by one: memory is at its peak here
    return NarrowFFN(best, torch.ones(best.width, device=best.out_weight.device))


def _centroids(known: KnownFFN, clustering: Clustering, how: str) -> NarrowFFN:
    """The narrow FFN of the clusters' means, with their sizes as scale.

    Their hidden activations are not among what was accumulated, so they are refitted to one half of the held-out
    tokens and judged on the other.
    """
    homogeneity = known.homogeneity
    factor = balancing_factors(known.weights, homogeneity)
    balanced = known.weights if factor is None else rescale(known.weights, factor, homogeneity or 1)
    centroids = average(balanced, clustering)
    if factor is not None:
        centroids = rescale(centroids, 1 / typical_factor(factor, clustering), homogeneity or 1)
    counts = clustering.counts.to(centroids.out_weight)
    if how == "none":
        return NarrowFFN(centroids, counts)
    hidden = look_inside(centroids, known.activation, known.inputs).hidden * counts
    half = len(hidden) // 2
    moments = moments_of_sample(hidden[:half], known.hidden[:half] @ known.weights.out_weight)
    held_out = moments_of_sample(hidden[half:], known.seen_outputs[half:])
    fitted, _ = _refitted(centroids, moments, held_out, known.metric_root, how)
    return NarrowFFN(fitted, counts)


def _refitted(
    narrow: FFNWeights, moments: Moments, held_out: SampleMoments, metric_root: Tensor | None, how: str
) -> tuple[FFNWeights, float]:
    """A narrow FFN with its out-projection fitted, and its relative squared error on held-out tokens."""
    prior, bias = narrow.out_weight, narrow.out_bias
    if how == "none":
        return narrow, held_out.error(in_metric(prior, metric_root))
    fit = refit(moments, prior, held_out, with_bias=bias is not None, metric_root=metric_root)
    if bias is not None and fit.bias_change is not None:
        bias = bias + fit.bias_change.to(bias)
    return FFNWeights(narrow.in_weights, narrow.in_biases, fit.out_weight.to(prior), bias), fit.error
