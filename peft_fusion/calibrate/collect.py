"""What calibration finds out of FFNs in a pass over the inputs, on one rank or added up over all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..ffn import Expert, OneFFN, activation_of, device_of, like_of, networks_of, read_one
from ..fusing.centroids import CentroidMoments
from ..fusing.moments import MomentSums
from ..fusing.statistics import SAMPLE_TOKENS, FFNStatistics
from ..fusing.weights import NarrowFFN
from ..observe import ranks
from ..observe.networks import Network
from .inputs import Inputs
from .tokens import Tokens, run_over


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
        add_up_moments(found)
    return moments


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


def add_up_moments(moments: MomentSums) -> None:
    """Makes the moments of one rank those of all."""
    if ranks.world() == 1:
        return
    tokens = ranks.sum_over_ranks(torch.tensor(moments.tokens))
    total = ranks.sum_of(moments.total)
    means = (ranks.sum_over_ranks(mean * moments.total) / (total or 1.0) for mean in moments.means)
    moments.reshift(*means)
    for name in ("gram", "cross", "sum", "sum_out"):
        setattr(moments, name, ranks.sum_over_ranks(getattr(moments, name)))
    moments.tokens, moments.total = int(tokens), total
