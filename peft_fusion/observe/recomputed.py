"""Backward passes layer by layer: what a layer computed is not kept but computed once more when its turn comes.

A graph then holds what goes into each layer, and the inside of one layer. Of a model that accelerate has dispatched it
holds the weights of that layer alone, for they are fetched once more, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..ffn import find_all
from .forwards import Forward, with_forwards


class Recomputed:
    """Layers that are computed once more for the backward pass, those into which no gradient goes back excepted.

    Args:
        layers: the layers, none within another.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        self.layers = layers
        self.again = False
        """Whether one of them is just being computed once more, so that hooks see what they have seen before."""

    @classmethod
    def of(cls, model: nn.Module) -> Recomputed:
        """The layers of a model that hold FFNs: of the outermost `nn.ModuleList` around each, the entries."""
        return cls(list({id(layer): layer for layer in _layers(model)}.values()))

    @contextmanager
    def running(self) -> Iterator[None]:
        """As long as the block runs, forward and backward passes alike."""
        with with_forwards(self.layers, self._computed_again):
            yield

    def _computed_again(self, layer: nn.Module) -> Forward:
        forward = layer.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(given, Tensor) and given.requires_grad for given in (*args, *kwargs.values())):
                return forward(*args, **kwargs)  # its graph begins behind its FFN, so that there is little to spare
            calls = 0

            def compute(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                self.again = calls > 1
                try:
                    return forward(*args, **kwargs)
                finally:
                    self.again = False

            with set_checkpoint_early_stop(False):  # to the end, where accelerate takes fetched weights away
                return checkpoint(compute, *args, use_reentrant=False, **kwargs)

        return run


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    for ffn in find_all(model):
        path = ffn.name.split(".")
        for depth in range(1, len(path)):
            if isinstance(model.get_submodule(".".join(path[:depth])), nn.ModuleList):
                yield model.get_submodule(".".join(path[: depth + 1]))
                break
