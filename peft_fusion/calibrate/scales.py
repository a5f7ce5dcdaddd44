"""Gradients for the scales: what the original's tangent kernels are, and what its narrow FFNs get back.

A narrow FFN's kernel depends on what goes into it and on the gradient that comes back to it, and both change once
all FFNs are narrow: sequences look more alike, and so do their gradients. So the original's kernels are taken of the
original, and the narrow FFNs' of the model with all of them in place.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..ffn import activation_of, networks_of, read_one
from ..fusing.gradient_kernels import TokenGradients, adam_kernels
from ..fusing.scales import fitted_scales, rescaled
from ..fusing.weights import NarrowFFN
from ..observe import ranks
from ..observe.batches import Batch
from ..observe.gradients import NoGradients, Tokens, gradients_of_sequence, joined
from ..observe.networks import Network
from ..observe.projection import random_projection
from ..progress import progress
from ..tuner.plan import AnyPlanned
from .inputs import Inputs
from .pieces import Piece, pieces_of
from .share import share_numbers
from .stand_ins import standing_in

MOST_TOKENS = 1024
"""Tokens that count of all sequences together: their inputs and gradients are kept for a group of FFNs."""

MAGNIFIED = 1024.0
"""f is multiplied by this, so that gradients in half precision do not vanish; the scales do not depend on it."""


def fit_scales_of(
    network: Network, groups: Sequence[list[AnyPlanned]], narrow: dict[str, NarrowFFN], inputs: Inputs, seed: int
) -> None:
    """Fits the scales of narrow FFNs to the original's tangent kernels; leaves them, with a warning, where it cannot.

    f is a random projection of what the model puts out, as in `fidelity`; no labels are needed. For each group one
    forward and one backward pass a sequence through the original, and as many with the narrow FFNs in place. Memory:
    the graph of one sequence, and of `MOST_TOKENS` tokens the inputs and gradients of a group's FFNs, in CPU memory.

    Args:
        network: the original model, running, and all planned FFNs.
        groups: the FFNs, group by group.
        narrow: name of a dense FFN or of an expert -> its narrow one, with scales that need no gradients; gets the
            fitted ones. What was fused by its weights has no scales that could be fitted, and stays.
        inputs: what the model is calibrated on; the held-out sequences are used.
        seed: of the projection.
    """
    sequences = inputs.for_the_scales
    if ranks.sum_of(len(sequences)) < 2:  # a kernel is between sequences
        return
    try:
        fitted: dict[str, list[float]] = {}
        for group in groups:
            fitted |= _fitted(network, group, narrow, sequences, seed)
    except NoGradients as error:
        warnings.warn(
            f"No gradients could be taken through {type(network.model).__name__}, so the scales of its narrow FFNs "
            f"are estimated without them: {error}",
            stacklevel=4,
        )
        return
    for name, scales in fitted.items():  # one by one, so that no second set of narrow weights is ever held
        narrow[name] = rescaled(narrow[name], scales)


def _fitted(
    network: Network, group: list[AnyPlanned], narrow: Mapping[str, NarrowFFN], sequences: Sequence[Batch], seed: int
) -> dict[str, list[float]]:
    """The fitted scales of one group's narrow FFNs."""
    of_group = network.of([p.ffn for p in group])
    originals = _gradients(of_group, sequences, seed)
    used = sequences[: len(next(iter(originals.values())).counts)]
    kernels = {}
    pieces = [p for p in pieces_of(group) if narrow[p.ffn.name].in_scales is not None]
    for p in pieces:
        tokens = _of_all_ranks(originals.pop(p.ffn.name))
        kernels[p.ffn.name] = adam_kernels(read_one(p.ffn), activation_of(p.ffn), tokens)
    with standing_in(network, narrow):  # all FFNs, not only the group
        found = _gradients(of_group, used, seed, all_of_them=True)
    narrow_tokens = {name: _of_all_ranks(own) for name, own in found.items()}

    def fit(p: Piece) -> list[float]:
        name = p.ffn.name
        return fitted_scales(narrow[name], kernels[name], narrow_tokens[name], activation_of(p.ffn))

    return share_numbers(pieces, fit, "Fitting scales")


def _gradients(
    network: Network, sequences: Sequence[Batch], seed: int, all_of_them: bool = False
) -> dict[str, TokenGradients]:
    """What goes into every FFN, and what comes back to its output, sequence by sequence until there is enough."""
    function = random_projection(network, seed)
    enough = MOST_TOKENS / ranks.world()

    def evaluate(batch: Batch) -> Tensor:
        return function(network(batch), batch)

    def take_them() -> dict[str, TokenGradients]:
        found: dict[str, list[Tokens]] = {one.name: [] for ffn in network.ffns for one in networks_of(ffn)}
        most = 0  # tokens of any FFN, one that several experts of a layer get counted once
        for count, sequence in enumerate(progress(sequences, "Taking gradients")):
            if most >= enough and count >= 2 and not all_of_them:
                break
            for name, tokens in gradients_of_sequence(network, sequence, evaluate, MAGNIFIED).items():
                found[name].append(tokens)
            last = {name: tokens[-1][0] for name, tokens in found.items()}
            most += max(_distinct([last[one.name] for one in networks_of(ffn)]) for ffn in network.ffns)
        return {name: _of_sequences(tokens) for name, tokens in found.items()}

    return ranks.together(take_them)


def _distinct(inputs: Sequence[Tensor]) -> int:
    """How many different tokens go into an FFN, or into any of a layer's experts."""
    return len(inputs[0]) if len(inputs) == 1 else len(torch.cat(list(inputs)).unique(dim=0))


def _of_sequences(tokens: Sequence[Tokens]) -> TokenGradients:
    return TokenGradients(*joined(tokens), tuple(len(x) for x, _ in tokens))


def _of_all_ranks(tokens: TokenGradients) -> TokenGradients:
    """The tokens of all ranks' sequences."""
    if ranks.world() == 1:
        return tokens
    counts = ranks.joined_over_ranks(tokens.inputs.new_tensor(tokens.counts).long())
    inputs, gradients = ranks.joined_over_ranks(tokens.inputs), ranks.joined_over_ranks(tokens.gradients)
    return TokenGradients(inputs, gradients, tuple(counts.tolist()))
