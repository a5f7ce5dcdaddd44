"""The methods by name, and what each can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..recipe import Recipe
from ..weights import FFNWeights, NarrowFFN
from .clustering import clustering
from .fusion import fuse
from .mmd import mmd
from .pruning import pruning
from .sketch import sketch


@dataclass(frozen=True)
class Method:
    """A way to make a narrow FFN.

    Args:
        narrow: makes it of weights, a width, a recipe and the activation's degree of homogeneity, without data. None:
            the method leaves the width and lowers the matrices' ranks instead (see `svd`).
        kernels: what it can compare neurons by; "auto" is the first for which enough is known.
        representatives: what can stand for its clusters, the choice without data first; none: it has no clusters.
        counts: whether the clusters' sizes can be a scale of their own.
        takes: those of `keep_neurons`, `n_init` and `max_iter` that it takes.
    """

    narrow: Callable[[FFNWeights, int, Recipe, int | None], NarrowFFN] | None
    kernels: tuple[str, ...] = ("weights",)
    representatives: tuple[str, ...] = ()
    counts: bool = False
    takes: tuple[str, ...] = ()

    @property
    def calibrated(self) -> bool:
        """Whether it can use what calibration finds out."""
        return self.kernels != ("weights",)

    @property
    def low_rank(self) -> bool:
        """Whether it lowers ranks and leaves the width."""
        return self.narrow is None


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "fusion": Method(
            lambda weights, width, r, homogeneity: fuse(
                weights, width, homogeneity=homogeneity, n_init=r.n_init, max_iter=r.max_iter, seed=r.seed
            ),
            kernels=("fisher", "outputs", "ntk", "weights"),
            representatives=("centroid", "neuron"),
            counts=True,
            takes=("n_init", "max_iter"),
        ),
        "clustering": Method(
            lambda weights, width, r, homogeneity: clustering(
                weights, width, homogeneity=homogeneity, n_init=r.n_init, max_iter=r.max_iter, seed=r.seed
            ),
            representatives=("centroid",),
            takes=("n_init", "max_iter"),
        ),
        "sketch": Method(
            lambda weights, width, r, homogeneity: sketch(
                weights, width, keep=r.keep_neurons, homogeneity=homogeneity, seed=r.seed
            ),
            takes=("keep_neurons",),
        ),
        "mmd": Method(lambda weights, width, r, homogeneity: mmd(weights, width, homogeneity=homogeneity, seed=r.seed)),
        "svd": Method(None),
        "pruning": Method(
            lambda weights, width, r, homogeneity: pruning(weights, width),
            kernels=("outputs", "fisher", "weights"),
            representatives=("neuron",),
        ),
    }
)
"""The method and everything it is compared with."""


def find_method(name: str) -> Method:
    """A method by name.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, but got {name!r}.")
    return METHODS[name]


def narrow_by(weights: FFNWeights, width: int, recipe: Recipe, homogeneity: int | None = None) -> NarrowFFN:
    """A narrow FFN by the recipe's method, without data.

    Args:
        weights: the FFN's weights.
        width: the number of neurons it is to have, from 1 to `weights.width`.
        recipe: how.
        homogeneity: for a plain FFN, its activation's degree of homogeneity (1 for ReLU); None if it has none.

    Returns:
        The narrow FFN; at full width, the FFN itself.

    Raises:
        ValueError: if there is no such method, it does not make FFNs narrower, or `width` is out of range.
    """
    narrow = find_method(recipe.method).narrow
    if narrow is None:
        raise ValueError(f'`method="{recipe.method}"` does not make FFNs narrower; it lowers the ranks of matrices.')
    return narrow(weights, width, recipe, homogeneity)
