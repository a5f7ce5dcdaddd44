"""Between a configuration and the recipe that everything below it reads."""

from __future__ import annotations

from ..fusing.methods import METHODS
from ..fusing.recipe import Recipe
from .config import FusionConfig

CALIBRATED_METHODS = tuple(name for name, method in METHODS.items() if method.calibrated)


def asked_recipe(config: FusionConfig) -> Recipe:
    """The recipe that a configuration asks for, with "auto" where any choice will do."""
    return Recipe(
        method=config.method,
        kernel=config.kernel,
        representative=config.representative,
        refit=config.refit,
        scale=config.scale,
        keep_neurons=config.keep_neurons,
        n_init=config.n_init,
        max_iter=config.max_iter,
        seed=config.seed,
    )


def recorded_recipe(config: FusionConfig) -> Recipe | None:
    """The recipe by which the narrow weights that a configuration belongs to were made; None if it records none.

    Raises:
        ValueError: if what it records is no recipe.
    """
    return Recipe.from_dict(config.fused_by) if config.fused_by else None
