"""Narrow FFNs in the place of the original ones, before any adapter is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from ..ffn import Routed, activation_of, capture_each, networks_of
from ..fusing.activations import run
from ..fusing.weights import NarrowFFN
from ..observe.networks import Network


@contextmanager
def standing_in(
    network: Network, narrow: Mapping[str, NarrowFFN], shares: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Every narrow FFN puts out what it does in the place of the original one, as long as the block runs.

    Args:
        network: the original model, running, and the FFNs that are to be replaced.
        narrow: name of a dense FFN or of an expert -> its narrow one.
        shares: the same names -> a tensor of the value 1, without dimensions: how much of the narrow FFN's error is
            there. Its gradient is by an output that moves on a line from the original's (0) to the narrow FFN's (1).
    """
    inputs: dict[str, Tensor] = {}
    activations = {one.name: activation_of(one) for ffn in network.ffns for one in networks_of(ffn)}

    def note(name: str, x: Tensor, routed: Routed | None) -> None:
        inputs[name] = x

    def replace(name: str, output: Tensor, routed: Routed | None) -> Tensor:
        own = run(narrow[name], activations[name], inputs.pop(name)).to(output.dtype)
        if shares is None:
            return own
        return own + (shares[name] - 1).to(own) * (own - output).detach()

    with capture_each(network.ffns, inputs=note, outputs=replace):
        yield
