"""Has a fused model compute its original or its narrow side, and leaves no trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ..ffn import is_away, offload, restore
from .layer import FusionLayer


@contextmanager
def showing(layers: Iterable[FusionLayer], originals: bool) -> Iterator[None]:
    """Has layers compute one of their two sides as long as the block runs, whatever is merged or disabled.

    Nothing else about them changes: what is merged stays merged, and offloaded originals are offloaded again.

    Args:
        layers: the layers.
        originals: whether they compute their original projections, or their active narrow ones (a layer without an
            active one goes on with its original).

    Raises:
        RuntimeError: if original weights that are to compute were dropped.
    """
    layers = list(layers)
    computing = [layer for layer in layers if originals or layer.active_narrow is None]
    for layer in computing:
        layer.require_originals()
    before = [layer._shown for layer in layers]
    away = [layer.original_layer for layer in computing if is_away(layer.original_layer)]
    try:
        for layer in computing:
            layer.follow()
            restore(layer.original_layer)
        for layer in layers:
            layer._shown = originals
        yield
    finally:
        for layer, shown in zip(layers, before, strict=True):
            layer._shown = shown
        for module in away:
            offload(module, keep=True)
