"""The methods by name, each called with those of the settings that it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..weights import FFNWeights, NarrowFFN
from .clustering import clustering
from .fusion import fuse
from .mmd import mmd
from .pruning import pruning
from .sketch import sketch

METHODS: Mapping[str, Callable[..., NarrowFFN]] = {
    "fusion": fuse,
    "clustering": clustering,
    "sketch": sketch,
    "mmd": mmd,
    "pruning": pruning,
}


def narrow_by(method: str, weights: FFNWeights, width: int, **settings: Any) -> NarrowFFN:
    """A narrow FFN by one of the methods that need no data.

    Args:
        method: a key of `METHODS`.
        weights: the FFN's weights.
        width: the number of neurons it is to have.
        settings: of any of the methods; those that this one does not take are left out.

    Returns:
        The narrow FFN.
    """
    function = METHODS[method]
    taken = inspect.signature(function).parameters
    return function(weights, width, **{name: value for name, value in settings.items() if name in taken})
