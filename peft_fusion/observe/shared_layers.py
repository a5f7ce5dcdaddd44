"""Layers in which two networks do not differ, run once for both of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..ffn import watch
from .forwards import Forward, with_forwards
from .networks import active_narrow, fusion_layers


@dataclass
class SharedLayers:
    """The layers of a model below the first one in which its narrow FFNs, or anything that trains, has a part.

    Args:
        layers: in the order in which they run; none if nothing can be shared.
    """

    layers: Sequence[nn.Module]
    _output: list[Any] = field(default_factory=list, repr=False)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Notes what comes out of the last of them as long as the block runs."""

        def note(module: nn.Module, args: Any, output: Any) -> None:
            self._output[:] = [output]

        with watch(self.layers[-1:], after=note):
            yield

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Has all of them give what was noted as long as the block runs, and compute nothing; then forgets it."""
        try:
            with with_forwards(self.layers, self._noted):
                yield
        finally:
            self._output.clear()

    def _noted(self, layer: nn.Module) -> Forward:
        def give(*args: Any, **kwargs: Any) -> Any:
            return self._output[0]

        return give


def shared_layers(model: nn.Module, training: Sequence[str]) -> SharedLayers:
    """The layers that a model with narrow FFNs shares with its original.

    What they put out is the same as long as nothing in them or before them trains; that is certain where all narrow
    FFNs, and all that trains, are in one list of layers.

    Args:
        model: the model, without wrappers.
        training: names of the parameters that train.
    """
    narrow = {id(layer) for layer in fusion_layers(model) if active_narrow(layer) is not None}
    changing = [name for name, module in model.named_modules() if id(module) in narrow]
    layers, numbers = in_one_list(model, [*changing, *training])
    return SharedLayers(layers[: min(numbers, default=0)])


def in_one_list(model: nn.Module, names: Sequence[str]) -> tuple[list[nn.Module], list[int]]:
    """The outermost list of layers that all of some modules or parameters are in, and in which of the layers.

    Args:
        model: the model, without wrappers.
        names: of the modules or parameters.

    Returns:
        The layers, and for each name the number of its layer; nothing if they are not all in one list.
    """
    matches = [re.match(r"(.*?)\.(\d+)\.", name) for name in names]
    paths = {match and match.group(1) for match in matches}
    path = paths.pop() if len(paths) == 1 else None
    layers = None if path is None else model.get_submodule(path)
    if not isinstance(layers, nn.ModuleList):
        return [], []
    return list(layers), [int(match.group(2)) for match in matches if match is not None]
