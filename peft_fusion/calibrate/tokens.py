"""One forward pass over the inputs: what goes through some FFNs, token by token, without padding.

An expert gets the tokens that are routed to it. What it puts out is multiplied by the router's weight, an error of it
too, so that a token counts by the square of that weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ffn import Routed, capture_each
from ..observe.batches import Batch, Positions, batch_size, unlabelled
from ..observe.needed_layers import NeededLayers
from ..observe.networks import Network, UnusableActivations
from ..progress import progress
from .inputs import HELD_OUT, Inputs


@dataclass(frozen=True)
class Tokens:
    """What goes through an FFN in one call, and what of it counts.

    Args:
        values: tensor of shape (tokens, dim).
        weights: of the tokens, shape (tokens,): the squares of the router's; None: all 1.
        numbers: those of the tokens to fit to, int64, on the device of `values`.
        held_out_numbers: those of the tokens that are held out.
    """

    values: Tensor
    weights: Tensor | None
    numbers: Tensor
    held_out_numbers: Tensor

    @property
    def training(self) -> tuple[Tensor, Tensor | None]:
        """The tokens to fit to, and their weights."""
        return self._of(self.numbers)

    @property
    def held_out(self) -> tuple[Tensor, Tensor | None]:
        """The tokens that are held out, and their weights."""
        return self._of(self.held_out_numbers)

    def _of(self, numbers: Tensor) -> tuple[Tensor, Tensor | None]:
        weights = None if self.weights is None else self.weights.index_select(0, numbers)
        return self.values.index_select(0, numbers), weights


TokenListener = Callable[[str, Tokens], Tensor | None]
"""Gets the name of a dense FFN or an expert, and what goes through it; it returns the tokens that it took, if any."""


def run_over(
    network: Network,
    inputs: Inputs,
    description: str,
    *,
    inputs_listener: TokenListener | None = None,
    hidden_listener: TokenListener | None = None,
) -> None:
    """One forward pass over the inputs that tells of the tokens that go into FFNs and into their out-projections.

    Layers behind the last of these FFNs do not run, where that can be.

    The host never waits for the device in it: tokens are chosen by numbers that the host knows, and whether all of
    them were finite is asked once, at the end.

    Raises:
        UnusableActivations: if a listener took a token that is not finite.
    """
    places: dict[str, Positions] = {}
    looks: dict[str, list[Look]] = {}
    seen = 0

    def told(listener: TokenListener) -> Callable[[str, Tensor, Routed | None], None]:
        kind = "inputs" if listener is inputs_listener else "hidden"
        words = "inputs" if kind == "inputs" else "hidden activations"

        def listen(name: str, activations: Tensor, routed: Routed | None) -> None:
            values = activations.detach().reshape(-1, activations.shape[-1])
            weights = None if routed is None else routed.weights.detach().float().square()
            valid, sequence = _placed(places[kind], name, activations, routed)
            held_out = (seen + sequence) % HELD_OUT == HELD_OUT - 1
            chosen = (numbers.nonzero().squeeze(1) for numbers in (valid & ~held_out, valid & held_out))
            on_device = (numbers.to(values.device, non_blocking=True) for numbers in chosen)
            taken = listener(name, Tokens(values, weights, *on_device))
            if taken is not None:
                looks.setdefault(name, []).append((words, seen, seen + size - 1, torch.isfinite(taken).all()))

        return listen

    listeners = {"inputs": inputs_listener, "hidden": hidden_listener}
    layers = NeededLayers(network)
    told_of = {kind: told(listener) for kind, listener in listeners.items() if listener is not None}
    with torch.no_grad(), capture_each(network.ffns, inputs=told_of.get("inputs"), hidden=told_of.get("hidden")):
        for batch in progress(inputs.batches, description):
            size = batch_size(batch)
            places.update({kind: _positions(network, batch) for kind in told_of})
            with layers.running():
                network(unlabelled(batch, network.is_encoder_decoder), logits=False)
            seen += size
    for name, found in looks.items():
        _require_finite(name, found)


Look = tuple[str, int, int, Tensor]
"""At what goes through an FFN: what it is, its first and last sequence, and whether it is finite, on the device."""


def _require_finite(name: str, looks: Sequence[Look]) -> None:
    """Refuses an FFN's activations if any were not finite, and tells which."""
    finite = torch.stack([found for *_, found in looks]).tolist()
    for (words, first, last, _), good in zip(looks, finite, strict=True):
        if not good:
            raise UnusableActivations(
                f"At the FFN {name!r} the {words} hold NaN or infinite values (sequences {first} to {last}). Check the "
                "model in this dtype, and the batch."
            )


def _positions(network: Network, batch: Batch) -> Positions:
    return Positions(batch, network.is_encoder_decoder)


def _placed(places: Positions, name: str, activations: Tensor, routed: Routed | None) -> tuple[Tensor, Tensor]:
    """Which tokens of a call are no padding, and the number of each one's sequence in its batch."""
    if routed is None:
        return places.of(name, activations)
    valid, sequence = places.of(name, activations.new_empty(routed.rows, 1))
    return valid[routed.tokens], sequence[routed.tokens]
