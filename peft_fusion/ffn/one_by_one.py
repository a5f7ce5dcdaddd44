"""FFNs one by one: a dense FFN, or one of a layer's experts, by itself; the same verbs for both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..fusing.activations import Activation, Combination
from ..fusing.weights import FFNWeights
from .capture import Listener, capture
from .every import AnyFFN
from .experts import Expert, Experts, combined
from .experts_run import ExpertListener, Routed, capture_experts
from .experts_weights import read_experts
from .find import FFN
from .linear import find_activation, read_ffn
from .storage import blank_like

OneFFN = FFN | Expert

OneListener = Callable[[str, Tensor, Routed | None], Tensor | None]
"""Gets an FFN's name, a tensor, and of an expert which of its module's tokens these are."""


def networks_of(ffn: AnyFFN) -> list[OneFFN]:
    """An FFN itself if it is dense, or each of the experts that it consists of."""
    return [Expert(ffn, index) for index in range(ffn.count)] if isinstance(ffn, Experts) else [ffn]


def read_one(ffn: OneFFN) -> FFNWeights:
    """The weights of a dense FFN or of an expert; see `read_ffn` and `read_experts`."""
    return read_experts(ffn.experts)[ffn.index] if isinstance(ffn, Expert) else read_ffn(ffn)


def activation_of(ffn: OneFFN) -> Activation:
    """What lies between the projections of a dense FFN or of an expert.

    Raises:
        ValueError: if the layout of a dense FFN does not say where it is.
    """
    if isinstance(ffn, Expert):
        return Combination(lambda pieces: combined(ffn.experts, pieces))
    return find_activation(ffn)


def like_of(ffn: OneFFN) -> Tensor:
    """An empty tensor on the device and in the precision of what a dense FFN or an expert computes."""
    return ffn.experts.like if isinstance(ffn, Expert) else blank_like(ffn.base_projections[-1])


def device_of(ffn: OneFFN) -> torch.device:
    """The device that a dense FFN or an expert computes on."""
    return (ffn.experts.like if isinstance(ffn, Expert) else blank_like(ffn.base_projections[0])).device


@contextmanager
def capture_each(
    ffns: Iterable[AnyFFN],
    *,
    inputs: OneListener | None = None,
    hidden: OneListener | None = None,
    outputs: OneListener | None = None,
) -> Iterator[None]:
    """Shows what goes through every dense FFN and every expert, as long as the block runs.

    Args:
        ffns: the FFNs, of either kind.
        inputs: called with what goes into the in-projections, (..., in_dim); of an expert (n, in_dim).
        hidden: called with what goes into the out-projection, (..., neurons).
        outputs: called with what comes out of it, (..., out_dim).
    """
    ffns = list(ffns)
    dense = [ffn for ffn in ffns if isinstance(ffn, FFN)]
    experts = [ffn for ffn in ffns if isinstance(ffn, Experts)]
    with (
        capture(dense, inputs=_of_dense(inputs), hidden=_of_dense(hidden), outputs=_of_dense(outputs)),
        capture_experts(experts, inputs=_of_expert(inputs), hidden=_of_expert(hidden), outputs=_of_expert(outputs)),
    ):
        yield


def _of_dense(listener: OneListener | None) -> Listener | None:
    return None if listener is None else lambda name, tensor: listener(name, tensor, None)


def _of_expert(listener: OneListener | None) -> ExpertListener | None:
    return None if listener is None else lambda routed, tensor: listener(routed.name, tensor, routed)
