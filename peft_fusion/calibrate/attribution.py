"""How much each FFN contributes to what all of them together change in the model's predictions.

An FFN's error curve is taken of it alone: the other FFNs are the original ones. Once all are narrow, errors meet: those
that point to the same predictions add up, and later FFNs amplify earlier ones' or make up for them. With e_l what the
error of FFN l does to the predictions, the divergence is to second order D = <e, F e> / 2 of their sum e, and

    s_l = <e_l, F e>        sum_l s_l = 2 D

is the part of FFN l in it, where its curve has <e_l, F e_l>. That is the derivative of D as the output of FFN l moves
from the original's to the narrow one's, so one backward pass gives it for all FFNs, with what is not of second order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..fusing.weights import NarrowFFN
from ..observe import ranks
from ..observe.batches import Batch, padding_mask, shortened, unlabelled
from ..observe.divergence import kl_divergences
from ..observe.gradients import gradients_by
from ..observe.networks import Network
from ..observe.outputs import predicted
from ..observe.recomputed import Recomputed
from ..progress import progress
from .stand_ins import standing_in

MAGNIFIED = 16.0
"""The divergence is multiplied by this, so that gradients in half precision do not vanish."""


def contributions(
    network: Network, narrow: Mapping[str, NarrowFFN], sequences: Sequence[Batch]
) -> tuple[float, dict[str, float]]:
    """How far predictions are from the original's with narrow FFNs in place, and the part of each of them in it.

    Memory: the graph of one layer over one sequence, its logits twice, and the narrow FFNs.

    Args:
        network: the original model, running, and its FFNs.
        narrow: FFN name -> its narrow FFN.
        sequences: of one rank, one a batch.

    Returns:
        The divergence a token, and FFN name -> its derivative by how much of that FFN's error there is; of all ranks.

    Raises:
        NoGradients: if there are none, or they are not finite.
    """

    def add_up() -> Tensor:
        total = torch.zeros(2 + len(narrow), dtype=torch.float64)
        for sequence in progress(sequences, "Taking FFNs' contributions"):
            total += _of_sequence(network, narrow, shortened(unlabelled(sequence, network.is_encoder_decoder)))
        return total

    tokens, divergence, *parts = ranks.sum_over_ranks(ranks.together(add_up)).tolist()
    return divergence / tokens, {name: part / tokens for name, part in zip(narrow, parts, strict=True)}


def _of_sequence(network: Network, narrow: Mapping[str, NarrowFFN], batch: Batch) -> Tensor:
    """Of one sequence: its tokens, its divergence, and the derivatives by every FFN's share."""
    shares = {name: torch.ones((), device=network.device, requires_grad=True) for name in narrow}
    with torch.no_grad():
        theirs, _ = _counting(network, batch)
    with torch.enable_grad(), Recomputed.of(network.model).running(), standing_in(network, narrow, shares):
        ours, spoken = _counting(network, batch)
        divergence = (kl_divergences(ours, theirs) if spoken else 0.5 * (ours - theirs).float().square()).sum()
        found = gradients_by(MAGNIFIED * divergence, list(shares.values()))
    derivatives = torch.stack([torch.zeros_like(divergence) if one is None else one for one in found]) / MAGNIFIED
    counted = torch.tensor([len(ours), float(divergence.detach())], dtype=torch.float64)
    return torch.cat([counted, derivatives.double().cpu()])


def _counting(network: Network, batch: Batch) -> tuple[Tensor, bool]:
    """What the model predicts at positions that count, (positions, classes or dim), and whether they are logits."""
    value, spoken = predicted(network, batch)
    mask = padding_mask(batch, value.shape, network.is_encoder_decoder)
    return (value.flatten(0, -2) if mask is None else value[mask.to(value.device)]), spoken
