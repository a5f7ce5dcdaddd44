"""Narrow FFNs in the place of the original ones, before any adapter is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from ..ffn import FFN, capture, find_activation
from ..fusing.activations import run
from ..fusing.weights import NarrowFFN
from ..observe.networks import Network


@contextmanager
def standing_in(
    network: Network, narrow: Mapping[str, NarrowFFN], shares: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Every narrow FFN puts out what it does in the place of the original one, as long as the block runs.

    Args:
        network: the original model, running; of its FFNs those stay that have no narrow one.
        narrow: FFN name -> its narrow FFN.
        shares: FFN name -> a tensor of the value 1, without dimensions: how much of the narrow FFN's error is there.
            Its gradient is by an output that moves on a line from the original's (0) to the narrow FFN's (1).
    """
    inputs: dict[str, Tensor] = {}
    ffns: dict[str, FFN] = {ffn.name: ffn for ffn in network.ffns if ffn.name in narrow}

    def note(name: str, x: Tensor) -> None:
        inputs[name] = x

    def replace(name: str, output: Tensor) -> Tensor:
        own = run(narrow[name], find_activation(ffns[name]), inputs.pop(name)).to(output.dtype)
        if shares is None:
            return own
        return own + (shares[name] - 1).to(own) * (own - output).detach()

    with capture(ffns.values(), inputs=note, outputs=replace):
        yield
