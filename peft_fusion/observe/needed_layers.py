"""Layers behind the last one that is looked at: they need not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..ffn import watch
from .networks import Network
from .shared_layers import in_one_list
from .stretches import Stretches


class NeededLayers:
    """The layers of a network up to the last one with an FFN that is looked at; the others give on what that one does.

    What a whole pass puts out is then nothing to look at. In the first pass all layers run: only if each of them ran
    once, in their order, and put out the same kind of thing, are there later passes in which some do not.

    Args:
        network: the network, of whose layers all FFNs that are looked at have to be in one list.
    """

    def __init__(self, network: Network) -> None:
        self._layers, numbers = in_one_list(network.model, [ffn.projection_names[-1] for ffn in network.ffns])
        self._needed = max(numbers, default=-1) + 1
        self._ran: list[tuple[nn.Module, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """As long as the block runs, which is one pass."""
        if not self._ran:
            with watch(self._layers, after=lambda layer, args, output: self._ran.append((layer, _kind(output)))):
                yield
        elif self._may_rest():
            with Stretches(self._layers).running(0, self._needed, None):
                yield
        else:
            yield

    def _may_rest(self) -> bool:
        ran, kinds = [id(layer) for layer, _ in self._ran], [kind for _, kind in self._ran]
        return ran == [id(layer) for layer in self._layers] and all(kind == kinds[0] for kind in kinds)


def _kind(output: Any) -> Any:
    """What outputs of layers have to have in common for one to be passed off as another."""
    if isinstance(output, tuple):
        return [_kind(part) for part in output]
    return output.shape if isinstance(output, Tensor) else type(output)
