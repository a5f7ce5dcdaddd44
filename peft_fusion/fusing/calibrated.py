"""Fusion that knows what goes through the FFN: cluster by it, refit to it, scale by it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .activations import Activation
from .centroids import CentroidMoments, centroids_of, clusters_of, refit_to, refit_to_held_out
from .held_out import HeldOut
from .kernels import find_kernel
from .known import KnownFFN, known_ffn
from .methods import find_method
from .methods.pruning import norm_products
from .neurons import eliminate, most_salient, most_salient_of_each
from .precision import exact_products
from .recipe import Recipe
from .refit import Problem, refit, with_fit
from .rows import check_width, select_rows
from .scales import match_sizes
from .statistics import FFNStatistics
from .weights import FFNWeights, NarrowFFN, cast


def fuse_calibrated(
    weights: FFNWeights,
    width: int,
    statistics: FFNStatistics,
    activation: Activation,
    recipe: Recipe,
    homogeneity: int | None = None,
    centroids: CentroidMoments | None = None,
) -> NarrowFFN:
    """A narrow FFN that does on the calibration inputs what the original does.

    With `recipe.kernel` "fisher" every error of an output is measured in that metric. Where real neurons stand for
    clusters, what each FFN gets is decided by the error on held-out tokens, between the most salient neuron of every
    cluster, the neurons left by `eliminate` and the most salient ones. The scale "ntk" is the one that matches the L1
    norms of gradients; `scales.fitted_scales` fits it, once all FFNs are narrow.

    Memory: about five times 4 * neurons ** 2 bytes at half the width.

    Args:
        weights: the FFN's weights.
        width: the number of neurons, from 1 to `weights.width`.
        statistics: what calibration found out about it.
        activation: its activation function.
        recipe: how, settled; of a method that can be calibrated.
        homogeneity: for a plain FFN, its activation's degree of homogeneity; None if it has none.
        centroids: where the recipe asks for centroids, those to take, and what they do on all training tokens; None:
            they are made here, and refitted to held-out tokens only.

    Returns:
        The narrow FFN, in the dtype of `weights`.

    Raises:
        ValueError: if `width` is out of range, the method or the kernel is none that can be used here, the statistics
            are of an FFN of another shape, or hold no gradients for the kernel "fisher".
    """
    with exact_products(weights.out_weight.device):
        known = known_for(weights, width, statistics, activation, recipe, homogeneity)
        if recipe.representative == "neuron":
            choices = list(_candidates(known, width, recipe))  # all of them first: clustering takes the most memory
            narrow = _best_of(choices, known, recipe.refit)
        else:
            narrow = _centroids(known, width, recipe, centroids)
        if recipe.scale == "ntk":
            narrow = match_sizes(weights, narrow.folded(), activation, known.inputs, known.token_weights)
    return NarrowFFN(cast(narrow.weights, weights.out_weight.dtype), narrow.scale, narrow.in_scales)


def cluster_centroids(
    weights: FFNWeights,
    width: int,
    statistics: FFNStatistics,
    activation: Activation,
    recipe: Recipe,
    homogeneity: int | None = None,
) -> NarrowFFN:
    """The centroids that `fuse_calibrated` would make of an FFN, to look at what they do (`CentroidMoments`).

    Args and errors are those of `fuse_calibrated`.

    Returns:
        The centroids in float32 at least, with the clusters' sizes as scale.
    """
    with exact_products(weights.out_weight.device):
        known = known_for(weights, width, statistics, activation, recipe, homogeneity)
        return centroids_of(known, width, recipe)


def known_for(
    weights: FFNWeights,
    width: int,
    statistics: FFNStatistics,
    activation: Activation,
    recipe: Recipe,
    homogeneity: int | None,
) -> KnownFFN:
    """Brings together what a recipe needs to know, and refuses what does not fit."""
    check_width(weights, width)
    method, kernel = find_method(recipe.method), find_kernel(recipe.kernel)
    if recipe.kernel not in method.kernels or not method.calibrated:
        raise ValueError(f'`kernel="{recipe.kernel}"` is nothing that `method="{recipe.method}"` is calibrated with.')
    return known_ffn(weights, statistics, activation, homogeneity, with_metric=kernel.needs_gradients)


def _candidates(known: KnownFFN, width: int, recipe: Recipe) -> Iterable[Tensor]:
    """Choices of real neurons to decide between, one by one."""
    if find_method(recipe.method).representatives == ("neuron",):
        compared = find_kernel(recipe.kernel).needs_statistics
        yield most_salient(known.saliency if compared else norm_products(known.weights), width)
        return
    labels = clusters_of(known, width, recipe).labels
    yield most_salient_of_each(known.saliency, labels, width).sort().values
    yield eliminate(known.second_moment(), known.seen_weight, width)
    yield most_salient(known.saliency, width)


def _best_of(choices: Iterable[Tensor], known: KnownFFN, how: str) -> NarrowFFN:
    """The narrow FFN of those real neurons that come closest to the original on held-out tokens.

    Of each choice one strength of the ridge is tried, and of the best one all that may be better: a fit takes long.
    """
    if how == "none":
        kept = min(choices, key=lambda kept: _held_out(known, kept).error(known.seen_weight[kept]))
        narrow = cast(select_rows(known.weights, kept), known.dtype)
    else:
        kept, problem = min(((kept, _problem(known, kept)) for kept in choices), key=lambda found: found[1].promise)
        narrow = with_fit(cast(select_rows(known.weights, kept), known.dtype), refit(problem), known.metric_root)
    return NarrowFFN(narrow, narrow.out_weight.new_ones(narrow.width).float())


def _problem(known: KnownFFN, kept: Tensor) -> Problem:
    """The refit of some of the neurons, in the metric's coordinates."""
    return Problem(known.moments_of_kept(kept), known.seen_weight[kept], _held_out(known, kept))


def _held_out(known: KnownFFN, kept: Tensor) -> HeldOut:
    return known.held_out(select_rows(known.weights, kept))


def _centroids(known: KnownFFN, width: int, recipe: Recipe, moments: CentroidMoments | None) -> NarrowFFN:
    """The narrow FFN of the clusters' means."""
    narrow = centroids_of(known, width, recipe) if moments is None else moments.narrow
    if recipe.refit == "none":
        return narrow
    if moments is None:
        return refit_to_held_out(narrow, known)
    held_out = known.held_out(narrow.weights, narrow.scale)
    return refit_to(narrow, moments.moments(), held_out, known.metric_root)
