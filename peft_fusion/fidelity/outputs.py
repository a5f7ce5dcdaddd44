"""How far the outputs of the narrow FFNs, and of the whole network, are from the original's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ffn import AnyFFN, capture
from ..observe.batches import Batch, padding_mask
from ..observe.divergence import kl_divergences
from ..observe.networks import Network
from ..observe.outputs import main_output, run_whole
from .errors import OutputError

Calls = dict[str, list[tuple[Tensor | None, Tensor]]]
"""FFN name -> the input and the output of each of its calls; of routed experts the output alone."""


@dataclass
class DistanceMean:
    """The running mean, over all tokens, of the norms of differences and of the original's norms."""

    distance: float = 0.0
    norm: float = 0.0
    tokens: int = 0

    def add(self, fused: Tensor, original: Tensor, mask: Tensor | None) -> None:
        """Adds tokens.

        Args:
            fused: tensor of shape (..., dim).
            original: the same for the original.
            mask: of shape (...,): the tokens that count; None for all.
        """
        original = original.to(fused.device)
        dtype = torch.promote_types(fused.dtype, torch.float32)
        distances = (fused.to(dtype) - original.to(dtype)).norm(dim=-1)
        norms = original.norm(dim=-1, dtype=dtype)
        if mask is not None:
            mask = mask.to(fused.device)
            distances, norms = distances[mask], norms[mask]
        self.distance += float(distances.sum(dtype=torch.float64))
        self.norm += float(norms.sum(dtype=torch.float64))
        self.tokens += distances.numel()

    def error(self) -> OutputError:
        """Their means; NaN if no token counted."""
        tokens = self.tokens or float("nan")
        return OutputError(self.distance / tokens, self.distance / self.norm if self.norm else float("nan"))


@dataclass
class DivergenceMean:
    """The running mean of KL(original || fused) of the predictions, in nats a position."""

    total: float = 0.0
    positions: int = 0

    def add(self, fused: Tensor, original: Tensor, mask: Tensor | None) -> None:
        """Adds the logits (..., classes) of both at positions (...), of which the mask says which count."""
        found = kl_divergences(fused.flatten(0, -2), original.to(fused.device).flatten(0, -2))
        found = found if mask is None else found[mask.to(found.device).flatten()]
        self.total += float(found.sum(dtype=torch.float64))
        self.positions += found.numel()

    def mean(self) -> float:
        """It; NaN if nothing was added."""
        return self.total / self.positions if self.positions else float("nan")


class OutputErrors:
    """Collects the output errors of a pair of networks, batch by batch.

    The inputs and outputs of the original's FFNs are held for one batch at a time.

    Args:
        original: the original network.
        fused: the fused one.
    """

    def __init__(self, original: Network, fused: Network) -> None:
        self.original, self.fused = original, fused
        self.ffns = {ffn.name: DistanceMean() for ffn in fused.ffns}
        self.hidden_states, self.outputs = DistanceMean(), DistanceMean()
        self.predictions = DivergenceMean()

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Runs both networks on a batch, and the fused one again with the original's inputs to every FFN."""
        calls: Calls = {ffn.name: [] for ffn in self.original.ffns}
        with self.original.running(), _recording(self.original.ffns, calls):
            expected = run_whole(self.original, batch)
        with self.fused.running():
            found = run_whole(self.fused, batch)
            with self._following(calls, batch):
                self.fused(batch)
        pairs = (found[0], expected[0]), *((get(found[1]), get(expected[1])) for get in (main_output, _logits))
        means: tuple[DistanceMean | DivergenceMean, ...] = (self.hidden_states, self.outputs, self.predictions)
        for mean, (ours, theirs) in zip(means, pairs, strict=True):
            if ours is not None and theirs is not None:
                mean.add(ours, theirs, padding_mask(batch, ours.shape, self.fused.is_encoder_decoder))

    def _following(self, calls: Calls, batch: Batch) -> AbstractContextManager[None]:
        """Feeds every FFN the original's inputs, measures its outputs, and passes the original's outputs on.

        Routed experts get the original's inputs as all that comes before them has put out what the original does.
        """
        left = {name: iter(pairs) for name, pairs in calls.items()}
        current: dict[str, Tensor] = {}

        def feed(name: str, x: Tensor) -> Tensor:
            original, current[name] = next(left[name])
            assert original is not None
            return original.to(x.device)

        def compare(name: str, y: Tensor) -> Tensor:
            original = (current.pop(name) if name in current else next(left[name])[1]).to(y.device)
            decoder = self.fused.is_encoder_decoder and "decoder" in name.split(".")
            self.ffns[name].add(y, original, padding_mask(batch, y.shape, decoder))
            return original  # so that a router behind this FFN sends the same tokens to the same experts

        return capture(self.fused.ffns, inputs=feed, outputs=compare)


def _recording(ffns: Sequence[AnyFFN], calls: Calls) -> AbstractContextManager[None]:
    """Notes the input, of dense ones, and the output of every call of every FFN."""
    inputs: dict[str, Tensor] = {}

    def note_input(name: str, x: Tensor) -> None:
        inputs[name] = x

    def note_output(name: str, y: Tensor) -> None:
        calls[name].append((inputs.pop(name, None), y.clone()))  # some models add to it in place

    return capture(ffns, inputs=note_input, outputs=note_output)


def _logits(output: Any) -> Tensor | None:
    logits: Tensor | None = getattr(output, "logits", None)
    return logits
