"""One forward pass over the inputs: what goes through some FFNs, token by token, without padding.

An expert gets the tokens that are routed to it. What it puts out is multiplied by the router's weight, an error of it
too, so that a token counts by the square of that weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ffn import Expert, OneFFN, Routed, activation_of, capture_each, device_of, like_of, networks_of, read_one
from ..fusing.centroids import CentroidMoments
from ..fusing.moments import MomentSums
from ..fusing.statistics import SAMPLE_TOKENS, FFNStatistics
from ..fusing.weights import NarrowFFN
from ..observe import ranks
from ..observe.batches import Batch, Positions, batch_size, unlabelled
from ..observe.networks import Network, UnusableActivations
from ..progress import progress
from .inputs import HELD_OUT, Inputs


def collect(network: Network, inputs: Inputs) -> dict[str, FFNStatistics]:
    """The statistics of a network's FFNs over the inputs of all ranks.

    Args:
        network: the original model in eval mode, and its FFNs.
        inputs: three sequences of four are for the products, the fourth is held out.

    Returns:
        Name of a dense FFN or of an expert -> its statistics, on its device. Those of an expert may be of no token.

    Raises:
        ValueError: if the model cannot take a batch, activations are not finite, or no token reaches an FFN.
    """
    statistics = {one.name: _empty(one) for ffn in network.ffns for one in networks_of(ffn)}

    def add(name: str, hidden: Tokens) -> Tensor:
        taken, weights = hidden.training
        statistics[name].add(taken, weights)
        return taken

    def hold_out(name: str, inputs: Tokens) -> Tensor:
        taken, weights = inputs.held_out
        statistics[name].hold_out(taken, weights)
        return taken

    ranks.together(lambda: run_over(network, inputs, "Calibrating", inputs_listener=hold_out, hidden_listener=add))
    for ffn in network.ffns:
        for one in networks_of(ffn):
            _add_up(statistics[one.name], one)
        of_ffn = [statistics[one.name] for one in networks_of(ffn)]
        tokens, held_out = sum(found.tokens for found in of_ffn), sum(found.held_out_tokens for found in of_ffn)
        if not tokens or not held_out:
            raise ValueError(
                f"No token went through the FFN {ffn.name!r} ({tokens} to fit to, {held_out} held out): check "
                "`attention_mask`, or leave the FFN out."
            )
    return statistics


def collect_centroids(
    network: Network, centroids: Mapping[str, NarrowFFN], inputs: Inputs
) -> dict[str, CentroidMoments]:
    """What centroids do on the training tokens of all ranks: a second pass, for their refit.

    Args:
        network: the original model in eval mode, and its FFNs.
        centroids: name of a dense FFN or of an expert -> its centroids, before any refit.
        inputs: as for `collect`.

    Returns:
        Name -> the moments of its centroids' hidden activations, for all that have centroids.
    """
    moments = {
        one.name: CentroidMoments(read_one(one), centroids[one.name], activation_of(one))
        for ffn in network.ffns
        for one in networks_of(ffn)
        if one.name in centroids
    }

    def add(name: str, inputs: Tokens) -> Tensor | None:
        if name not in moments:
            return None
        taken, weights = inputs.training
        moments[name].add_inputs(taken, weights)
        return taken

    ranks.together(lambda: run_over(network, inputs, "Refitting centroids", inputs_listener=add))
    for found in moments.values():
        _add_up_moments(found)
    return moments


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
    told_of = {kind: told(listener) for kind, listener in listeners.items() if listener is not None}
    with torch.no_grad(), capture_each(network.ffns, inputs=told_of.get("inputs"), hidden=told_of.get("hidden")):
        for batch in progress(inputs.batches, description):
            size = batch_size(batch)
            places.update({kind: _positions(network, batch) for kind in told_of})
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


def _empty(ffn: OneFFN) -> FFNStatistics:
    room = -(-SAMPLE_TOKENS // ranks.world())
    return FFNStatistics(ffn.width, ffn.in_dim, device_of(ffn), room, weighted=isinstance(ffn, Expert))


def _add_up(statistics: FFNStatistics, ffn: OneFFN) -> None:
    """Makes the statistics of one rank those of all."""
    if ranks.world() == 1:
        return
    tokens = ranks.sum_over_ranks(torch.tensor(statistics.tokens))
    total = ranks.sum_of(statistics.total)
    added = statistics.mean * statistics.total if statistics.tokens else torch.zeros_like(statistics.mean)
    statistics.reshift(ranks.sum_over_ranks(added) / (total or 1.0))
    statistics.product = ranks.sum_over_ranks(statistics.product)
    statistics.sum = ranks.sum_over_ranks(statistics.sum)
    statistics.tokens, statistics.total = int(tokens), total
    held_out = statistics.held_out if statistics.held_out_tokens else like_of(ffn).new_zeros(0, ffn.in_dim)
    weights = statistics.held_out_weights
    statistics.replace_held_out(
        ranks.joined_over_ranks(held_out), None if weights is None else ranks.joined_over_ranks(weights)
    )


def _add_up_moments(moments: MomentSums) -> None:
    """Makes the moments of one rank those of all."""
    if ranks.world() == 1:
        return
    tokens = ranks.sum_over_ranks(torch.tensor(moments.tokens))
    own = moments.moments()
    total = ranks.sum_of(moments.total)
    means = (ranks.sum_over_ranks(mean * moments.total) / (total or 1.0) for mean in (own.mean, own.mean_out))
    moments.reshift(*means)
    for name in ("gram", "cross", "sum", "sum_out", "power"):
        setattr(moments, name, ranks.sum_over_ranks(getattr(moments, name)))
    moments.tokens, moments.total = int(tokens), total
