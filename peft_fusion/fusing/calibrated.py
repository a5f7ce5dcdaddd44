"""Fusion that knows what goes through the FFN: cluster by it, refit to it, scale by it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .activations import Activation, look_by_parts, look_inside
from .cluster.kmeans import Clustering, kernel_kmeans
from .kernels import metric_root, ntk_kernel, output_kernel, weight_kernel
from .methods.fusion import average, typical_factor
from .methods.pruning import norm_products
from .neurons import eliminate, most_salient, most_salient_of_each
from .refit import Moments, SampleMoments, moments_of_kept, moments_of_sample, refit, seen
from .rows import check_width, select_rows
from .scales import match_tangent_kernel
from .statistics import FFNStatistics
from .symmetry import balancing_factors, rescale
from .weights import FFNWeights, NarrowFFN, cast


@dataclass(frozen=True)
class _Known:
    """An FFN and what calibration found out about it; `root` is that of the metric in which outputs are compared."""

    weights: FFNWeights
    statistics: FFNStatistics
    activation: Activation
    second_moment: Tensor
    inputs: Tensor
    hidden: Tensor
    root: Tensor | None

    @cached_property
    def seen_weight(self) -> Tensor:
        """The out-weights in the coordinates of the metric, in which their lengths count."""
        return seen(self.weights.out_weight, self.root)

    @cached_property
    def seen_outputs(self) -> Tensor:
        """What the FFN puts out on the held-out inputs, without its bias, in the same coordinates."""
        return self.hidden @ self.seen_weight

    @property
    def saliency(self) -> Tensor:
        """E[h_i^2] |w2_i|^2, the size of what each neuron puts out."""
        return self.second_moment.diagonal() * self.seen_weight.square().sum(1)


def fuse_calibrated(
    weights: FFNWeights,
    width: int,
    statistics: FFNStatistics,
    activation: Activation,
    *,
    method: str = "fusion",
    kernel: str = "outputs",
    representative: str = "neuron",
    refit: str = "ridge",
    scale: str = "ntk",
    homogeneity: int | None = None,
    n_init: int | None = None,
    max_iter: int | None = None,
    seed: int = 0,
) -> NarrowFFN:
    """A narrow FFN that does on the calibration inputs what the original does.

    Args:
        weights: the FFN's weights.
        width: the number of neurons, from 1 to `weights.width`.
        statistics: what calibration found out about it.
        activation: its activation function.
        method: "fusion" or "pruning" (the most salient neurons).
        kernel: what neurons are compared by: "weights", "outputs", "fisher" or "ntk". With "fisher" every error of an
            output is measured in that metric.
        representative: what stands for a cluster: "centroid", its mean; "neuron", a real one. For real ones, what
            each FFN gets is decided by the error on held-out tokens, between the most salient neuron of every
            cluster, the neurons left by `eliminate` and the most salient ones.
        refit: "ridge": the out-projection is fitted anew; "none".
        scale: "counts" (for centroids), "ntk" or "none".
        homogeneity: for a plain FFN, its activation's homogeneity of homogeneity; None if it has none.
        n_init: restarts of the clustering; None for the engine's default.
        max_iter: iterations of the clustering; None for the engine's default.
        seed: makes the clustering repeatable.

    Returns:
        The narrow FFN, in the dtype of `weights`.

    Raises:
        ValueError: if `width` is out of range, the statistics are of an FFN of another shape, or hold no gradients
            for the kernel "fisher".
    """
    check_width(weights, width)
    known = _known(weights, statistics, activation, kernel)
    clustering = {"n_init": n_init, "max_iter": max_iter}
    settings = {name: value for name, value in clustering.items() if value is not None}

    def clusters() -> Clustering:
        return kernel_kmeans(_kernel(known, kernel, homogeneity), width, seed=seed, **settings)

    if method == "pruning":
        saliency = norm_products(weights) if kernel == "weights" else known.saliency
        narrow = _best_of([most_salient(saliency, width)], known, refit)
    elif representative == "neuron":
        narrow = _best_of(_candidates(known, clusters(), width), known, refit)
    else:
        narrow = _centroids(known, clusters(), homogeneity, refit)
    if scale == "ntk":
        folded = narrow.folded()
        narrow = match_tangent_kernel(known.weights, folded, activation, known.inputs, statistics.tangents)
    return NarrowFFN(cast(narrow.weights, weights.out_weight.dtype), narrow.scale, narrow.in_scales)


def _known(weights: FFNWeights, statistics: FFNStatistics, activation: Activation, kernel: str) -> _Known:
    """Brings everything together in float32 on the device of the weights.

    Raises:
        ValueError: if the statistics are of an FFN of another shape, or lack what the kernel needs.
    """
    shape = (weights.width, weights.in_weights[0].shape[1])
    if shape != (statistics.width, statistics.in_dim):
        raise ValueError(
            f"The statistics are of an FFN of {statistics.width} neurons and {statistics.in_dim} inputs, but this one "
            f"has {shape[0]} and {shape[1]}. Calibrate again."
        )
    if kernel == "fisher" and statistics.fisher is None:
        raise ValueError('The kernel "fisher" needs gradients, and these statistics have none.')
    weights = cast(weights, torch.promote_types(weights.out_weight.dtype, torch.float32))
    root = None
    if kernel == "fisher" and statistics.fisher is not None:
        root = metric_root(statistics.fisher.to(weights.out_weight))
    moment = statistics.second_moment.to(weights.out_weight.device)
    inputs = statistics.held_out.to(weights.out_weight)
    hidden = torch.cat([inside.hidden for inside in look_by_parts(weights, activation, inputs)])
    return _Known(weights, statistics, activation, moment, inputs, hidden, root)


def _kernel(known: _Known, kernel: str, homogeneity: int | None) -> Tensor:
    if kernel == "weights":
        return weight_kernel(known.weights, homogeneity)
    if kernel in ("outputs", "fisher"):
        return output_kernel(known.seen_weight, known.second_moment)
    return ntk_kernel(known.weights, known.second_moment, known.inputs, known.activation, homogeneity)


def _candidates(known: _Known, clustering: Clustering, width: int) -> list[Tensor]:
    """Choices of real neurons to decide between."""
    return [
        most_salient_of_each(known.saliency, clustering.labels, width).sort().values,
        eliminate(known.second_moment, known.seen_weight, width),
        most_salient(known.saliency, width),
    ]


def _best_of(candidates: list[Tensor], known: _Known, how: str) -> NarrowFFN:
    """The narrow FFN of those real neurons that come closest to the original on held-out tokens."""
    device = known.second_moment.device
    covariance, mean = known.statistics.covariance.to(device), known.statistics.mean.to(device)

    def fitted(kept: Tensor) -> tuple[FFNWeights, float]:
        narrow = select_rows(known.weights, kept)
        moments = moments_of_kept(covariance, mean, known.weights.out_weight, kept)
        held_out = moments_of_sample(known.hidden[:, kept], known.seen_outputs)
        return _refitted(narrow, moments, held_out, known.root, how)

    best, _ = min(map(fitted, candidates), key=lambda found: found[1])  # one by one: memory is at its peak here
    return NarrowFFN(best, torch.ones(best.width, device=best.out_weight.device))


def _centroids(known: _Known, clustering: Clustering, homogeneity: int | None, how: str) -> NarrowFFN:
    """The narrow FFN of the clusters' means, with their sizes as scale.

    Their hidden activations are not among what was accumulated, so they are refitted to one half of the held-out
    tokens and judged on the other.
    """
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
    fitted, _ = _refitted(centroids, moments, held_out, known.root, how)
    return NarrowFFN(fitted, counts)


def _refitted(
    narrow: FFNWeights, moments: Moments, held_out: SampleMoments, root: Tensor | None, how: str
) -> tuple[FFNWeights, float]:
    """A narrow FFN with its out-projection fitted, and its relative squared error on held-out tokens."""
    prior, bias = narrow.out_weight, narrow.out_bias
    if how == "none":
        return narrow, held_out.error(seen(prior, root))
    fit = refit(moments, prior, held_out, with_bias=bias is not None, root=root)
    if bias is not None and fit.bias_change is not None:
        bias = bias + fit.bias_change.to(bias)
    return FFNWeights(narrow.in_weights, narrow.in_biases, fit.out_weight.to(prior), bias), fit.error
