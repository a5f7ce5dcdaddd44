"""One forward pass over the inputs: what goes through some FFNs, token by token, without padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..ffn import FFN, capture, device_of, find_activation, read_ffn
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
        FFN name -> its statistics, on the FFN's device.

    Raises:
        ValueError: if the model cannot take a batch, activations are not finite, or no token reaches an FFN.
    """
    statistics = {ffn.name: _empty(ffn) for ffn in network.ffns}

    def add(name: str, hidden: Tensor, training: Tensor, held_out: Tensor) -> Tensor:
        taken = hidden.index_select(0, training)
        statistics[name].add(taken)
        return taken

    def hold_out(name: str, x: Tensor, training: Tensor, held_out: Tensor) -> Tensor:
        taken = x.index_select(0, held_out)
        statistics[name].hold_out(taken)
        return taken

    ranks.together(lambda: run_over(network, inputs, "Calibrating", inputs_listener=hold_out, hidden_listener=add))
    for name, found in statistics.items():
        _add_up(found)
        if not found.tokens or not found.held_out_tokens:
            raise ValueError(
                f"No token went through the FFN {name!r} ({found.tokens} to fit to, {found.held_out_tokens} held "
                "out): check `attention_mask`, or leave the FFN out."
            )
    return statistics


def collect_centroids(
    network: Network, centroids: Mapping[str, NarrowFFN], inputs: Inputs
) -> dict[str, CentroidMoments]:
    """What centroids do on the training tokens of all ranks: a second pass, for their refit.

    Args:
        network: the original model in eval mode, and its FFNs.
        centroids: FFN name -> its centroids, before any refit.
        inputs: as for `collect`.

    Returns:
        FFN name -> the moments of its centroids' hidden activations.
    """
    moments = {
        ffn.name: CentroidMoments(read_ffn(ffn), centroids[ffn.name], find_activation(ffn)) for ffn in network.ffns
    }

    def add(name: str, x: Tensor, training: Tensor, held_out: Tensor) -> Tensor:
        taken = x.index_select(0, training)
        moments[name].add_inputs(taken)
        return taken

    ranks.together(lambda: run_over(network, inputs, "Refitting centroids", inputs_listener=add))
    for found in moments.values():
        _add_up_moments(found)
    return moments


TokenListener = Callable[[str, Tensor, Tensor, Tensor], Tensor]
"""Gets the FFN's name, (tokens, dim), and the numbers of the tokens for training and of those held out.

It returns the tokens that it took.
"""


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

    def told(listener: TokenListener) -> Callable[[str, Tensor], None]:
        kind = "inputs" if listener is inputs_listener else "hidden"
        words = "inputs" if kind == "inputs" else "hidden activations"

        def listen(name: str, activations: Tensor) -> None:
            tokens = activations.detach().reshape(-1, activations.shape[-1])
            valid, sequence = places[kind].of(name, activations)
            held_out = (seen + sequence) % HELD_OUT == HELD_OUT - 1
            chosen = (numbers.nonzero().squeeze(1) for numbers in (valid & ~held_out, valid & held_out))
            taken = listener(name, tokens, *(numbers.to(tokens.device, non_blocking=True) for numbers in chosen))
            looks.setdefault(name, []).append((words, seen, seen + size - 1, torch.isfinite(taken).all()))

        return listen

    listeners = {"inputs": inputs_listener, "hidden": hidden_listener}
    told_of = {kind: told(listener) for kind, listener in listeners.items() if listener is not None}
    with torch.no_grad(), capture(network.ffns, inputs=told_of.get("inputs"), hidden=told_of.get("hidden")):
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


def _empty(ffn: FFN) -> FFNStatistics:
    room = -(-SAMPLE_TOKENS // ranks.world())
    return FFNStatistics(ffn.width, ffn.in_dim, device_of(ffn), room)


def _add_up(statistics: FFNStatistics) -> None:
    """Makes the statistics of one rank those of all."""
    if ranks.world() == 1:
        return
    tokens = ranks.sum_over_ranks(torch.tensor(statistics.tokens))
    total = statistics.mean * statistics.tokens if statistics.tokens else torch.zeros_like(statistics.mean)
    statistics.reshift(ranks.sum_over_ranks(total) / tokens.clamp(min=1))
    statistics.product = ranks.sum_over_ranks(statistics.product)
    statistics.sum = ranks.sum_over_ranks(statistics.sum)
    statistics.tokens = int(tokens)
    statistics.replace_held_out(ranks.joined_over_ranks(statistics.held_out))


def _add_up_moments(moments: MomentSums) -> None:
    """Makes the moments of one rank those of all."""
    if ranks.world() == 1:
        return
    tokens = ranks.sum_over_ranks(torch.tensor(moments.tokens))
    own = moments.moments()
    means = (ranks.sum_over_ranks(mean * moments.tokens) / tokens.clamp(min=1) for mean in (own.mean, own.mean_out))
    moments.reshift(*means)
    for name in ("gram", "cross", "sum", "sum_out", "power"):
        setattr(moments, name, ranks.sum_over_ranks(getattr(moments, name)))
    moments.tokens = int(tokens)
