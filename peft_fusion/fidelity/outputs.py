"""How far the outputs of the narrow FFNs, and of the whole network, are from the original's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ffn import FFN
from ..observe.batches import padding_mask
from ..observe.networks import Batch, Network
from ..observe.outputs import main_output, run_whole
from .report import OutputError


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

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Runs both networks on a batch, and the fused one again with the original's inputs to every FFN."""
        recorded: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        with self.original.running(), _recording(self.original.ffns, recorded):
            expected = _outputs(self.original, batch)
        with self.fused.running():
            found = _outputs(self.fused, batch)
            with ExitStack() as stack:
                for ffn in self.fused.ffns:
                    stack.enter_context(self._following(ffn, recorded[ffn.name], batch))
                self.fused(batch, hidden_states=False)
        for mean, ours, theirs in zip((self.hidden_states, self.outputs), found, expected, strict=True):
            if ours is not None and theirs is not None:
                mean.add(ours, theirs, padding_mask(batch, ours.shape, self.fused.is_encoder_decoder))

    @contextmanager
    def _following(self, ffn: FFN, recorded: list[tuple[Tensor, Tensor]], batch: Batch) -> Iterator[None]:
        """Feeds an FFN the original's inputs, measures its outputs, and passes the original's outputs on."""
        *ins, out = ffn.projections
        is_encoder_decoder = self.fused.is_encoder_decoder and "decoder" in ffn.name.split(".")
        queues = {module: iter(recorded) for module in (*ins, out)}

        def feed(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (next(queues[module])[0].to(args[0].device), *args[1:])

        def compare(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            original = next(queues[module])[1].to(output.device)
            self.ffns[ffn.name].add(output, original, padding_mask(batch, output.shape, is_encoder_decoder))
            return original  # so that a router behind this FFN sends the same tokens to the same experts

        handles = [module.register_forward_pre_hook(feed) for module in ins] + [out.register_forward_hook(compare)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _recording(ffns: list[FFN], recorded: dict[str, list[tuple[Tensor, Tensor]]]) -> Iterator[None]:
    """Notes the input and the output of every call of every FFN."""
    handles = []
    for ffn in ffns:
        inputs: list[Tensor] = []
        calls = recorded[ffn.name]

        def note_input(module: nn.Module, args: tuple[Tensor, ...], inputs: list[Tensor] = inputs) -> None:
            inputs.append(args[0])

        def note_output(
            module: nn.Module, args: Any, output: Tensor, inputs: list = inputs, calls: list = calls
        ) -> None:
            calls.append((inputs.pop(), output.clone()))  # some models add to it in place

        handles.append(ffn.projections[0].register_forward_pre_hook(note_input))
        handles.append(ffn.projections[-1].register_forward_hook(note_output))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _outputs(side: Network, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
    """The hidden states behind the last layer, and what the model is there for."""
    hidden, output = run_whole(side, batch)
    return hidden, main_output(output)
