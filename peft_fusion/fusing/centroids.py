"""Averaged neurons that stand for clusters, and their refit to all training tokens by a second pass over them.

What calibration accumulates of an FFN says all there is to know about a choice of its neurons, but not what their
means do: their hidden activations are new. So centroids take two passes: one to cluster by, one to be refitted to.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .activations import Activation, hidden_activations, in_chunks
from .cluster.kmeans import Clustering, kernel_kmeans
from .held_out import HeldOut
from .kernels import find_kernel
from .known import KnownFFN
from .methods.fusion import centroids
from .metric import in_metric
from .moments import Moments, MomentSums
from .precision import exact_products
from .recipe import Recipe
from .refit import Problem, refit, with_fit
from .weights import FFNWeights, NarrowFFN, cast


def clusters_of(known: KnownFFN, width: int, recipe: Recipe) -> Clustering:
    """An FFN's neurons clustered by the recipe's kernel."""
    gram = find_kernel(recipe.kernel).between(known)
    return kernel_kmeans(gram, width, n_init=recipe.n_init, max_iter=recipe.max_iter, seed=recipe.seed)


def centroids_of(known: KnownFFN, width: int, recipe: Recipe) -> NarrowFFN:
    """The narrow FFN of the clusters' means, with their sizes as scale, before any refit.

    Args:
        known: the FFN and what calibration found out about it.
        width: the number of clusters.
        recipe: what neurons are compared by, and how they are clustered.

    Returns:
        The centroids, in float32 at least.
    """
    clustering = clusters_of(known, width, recipe)
    return centroids(cast(known.weights, known.dtype), clustering, known.homogeneity)


class CentroidMoments(MomentSums):
    """What a refit of centroids has to know of the training tokens; their inputs are added in a second pass.

    Memory: 4 * width * (width + out_dim) bytes, and that of the FFN on `CHUNK` tokens.

    Args:
        weights: the original FFN's weights.
        narrow: its centroids.
        activation: its activation function.
    """

    def __init__(self, weights: FFNWeights, narrow: NarrowFFN, activation: Activation) -> None:
        out_weight = weights.out_weight
        super().__init__(narrow.weights.width, out_weight.shape[1], out_weight.device)
        self.narrow = narrow
        self._weights, self._activation = weights, activation

    def add_inputs(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Adds training tokens.

        Args:
            inputs: tensor of shape (tokens, in_dim), what goes into the FFN.
            weights: of the tokens, shape (tokens,), none negative; None: all 1.
        """
        with exact_products(self.gram.device):
            for x, own_weights in in_chunks(inputs.to(self.gram.device), weights):
                hidden = hidden_activations(self._weights, self._activation, x)
                own = hidden_activations(self.narrow, self._activation, x)
                self.add(own, hidden @ self._weights.out_weight.to(hidden), own_weights)


def refit_to(narrow: NarrowFFN, moments: Moments, held_out: HeldOut, metric_root: Tensor | None = None) -> NarrowFFN:
    """A narrow FFN with its out-projection fitted to what the original puts out.

    Args:
        narrow: it before; its scale stays.
        moments: of its hidden activations, times the scale, and the original's outputs over the tokens to fit to.
        held_out: both on held-out tokens, with the outputs in the metric's coordinates.
        metric_root: of the metric in which errors are measured; None: the plain one.
    """
    moments = _as_fitted(narrow, moments.in_metric(metric_root))
    fit = refit(Problem(moments, in_metric(narrow.weights.out_weight, metric_root), held_out))
    return replace(narrow, weights=with_fit(narrow.weights, fit, metric_root))


def refit_to_held_out(narrow: NarrowFFN, known: KnownFFN) -> NarrowFFN:
    """The same without a second pass: fitted to one half of the held-out tokens and judged on the other."""
    half = len(known.inputs) // 2
    to_fit, held_out = (
        known.held_out(narrow.weights, narrow.scale, part) for part in (slice(0, half), slice(half, None))
    )
    moments = _as_fitted(narrow, to_fit.moments())
    fit = refit(Problem(moments, in_metric(narrow.weights.out_weight, known.metric_root), held_out))
    return replace(narrow, weights=with_fit(narrow.weights, fit, known.metric_root))


def _as_fitted(narrow: NarrowFFN, moments: Moments) -> Moments:
    """About means where there is a bias to take them."""
    return moments.about_zero() if narrow.weights.out_bias is None else moments
