"""Stretches of a model's layers run by themselves: what the layer before them put out is given, those behind rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ffn import watch
from .batches import Batch
from .forwards import with_forwards
from .networks import Network
from .shared_layers import in_one_list

TOLERANCE = 0.01
"""How far a layer by itself may be from what it puts out in a whole pass, relative to it: rounding, nothing else."""


class Stretches:
    """Layers each of which runs once in a pass, in their order, and takes of the others what the one before puts out.

    Args:
        layers: all of them, in their order.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)

    @classmethod
    def of(cls, network: Network, batch: Batch) -> Stretches | None:
        """The layers that a network's FFNs are in, if they can run stretch by stretch, which is tried.

        Args:
            network: the network, running, and its FFNs.
            batch: what to try it on.
        """
        found = cls(in_one_list(network.model, [ffn.projection_names[-1] for ffn in network.ffns])[0])
        ran: list[nn.Module] = []
        with watch(found.layers, after=lambda layer, args, output: ran.append(layer)):
            outputs = found.outputs(network, batch)
        if not ran or [id(layer) for layer in ran] != [id(layer) for layer in found.layers]:
            return None
        if not all(isinstance(passed_on(output), Tensor) for output in outputs):
            return None
        for number in range(1, len(outputs)):
            try:
                with torch.no_grad(), found.running(number, number + 1, outputs[number - 1]) as noted:
                    network(batch, logits=False)
            except ValueError:  # the whole pass went well: it lacks what another layer leaves for it
                return None
            if not _same(passed_on(noted[number]), passed_on(outputs[number])):
                return None
        return found

    def outputs(self, network: Network, batch: Batch) -> list[Any]:
        """What every layer puts out in a whole pass of a network over a batch."""
        every = range(len(self.layers))
        with torch.no_grad(), self.running(0, len(self.layers), None, also=every) as noted:
            network(batch, logits=False)
        return [noted[number] for number in sorted(noted)]

    @contextmanager
    def running(self, start: int, stop: int, given: Any, also: Sequence[int] = ()) -> Iterator[dict[int, Any]]:
        """As long as the block runs, which is one pass, only the layers from `start` to before `stop` do.

        Args:
            start: the first that runs.
            stop: the first behind them; at least `start + 1`.
            given: what the layer before `start` puts out, of the same batch; not looked at where there is none.
            also: of which layers to note what they put out, beside the last one that runs.

        Yields:
            Number of a layer -> what it put out, of those that ran and are noted.
        """
        numbers = {id(layer): number for number, layer in enumerate(self.layers)}
        noted: dict[int, Any] = {}

        def note(layer: nn.Module, args: Any, output: Any) -> None:
            noted[numbers[id(layer)]] = output

        noting = {*also, stop - 1} & set(range(start, stop))
        resting = [*self.layers[:start], *self.layers[stop:]]
        with (
            watch([self.layers[number] for number in sorted(noting)], after=note),
            with_forwards(resting, lambda layer: lambda *args, **kwargs: noted.get(stop - 1, given)),
        ):
            yield noted


def passed_on(output: Any) -> Any:
    """Of what a layer puts out, the hidden states that the next one takes."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _same(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    apart = (found.float() - expected.float()).norm()
    return bool(apart <= TOLERANCE * expected.float().norm())
