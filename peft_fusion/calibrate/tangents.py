"""Gradients for the scales: what the original's tangent kernels are, and what narrow FFNs would get back.

A narrow FFN's kernel depends on what goes into it and on the gradient that comes back to it, and both change once
all FFNs are narrow: sentences look more alike, and so do their gradients. So the original's kernels are taken of the
original, and what the narrow FFNs are compared by of the model with quick stand-ins in place of its FFNs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..ffn import find_activation, read_ffn
from ..fusing.gradient_kernels import TokenGradients, adam_kernels
from ..fusing.scales import Tangents
from ..fusing.stand_in import stand_in
from ..fusing.statistics import FFNStatistics
from ..observe.gradients import Batch, gradients_of_sequence, joined
from ..observe.networks import Network
from ..observe.projection import Function, random_projection
from ..progress import progress
from ..tuner.plan import PlannedFFN

MOST_SEQUENCES, FEWEST_SEQUENCES = 24, 6
"""Sentences to take gradients of: one of 20 that calibration sees, within these bounds."""

MOST_TOKENS = 1024
"""Tokens that count of all sentences together: their inputs and gradients are kept until the FFN is fused."""

Gradients = dict[str, TokenGradients]


def add_tangents(
    model: nn.Module,
    planned: Sequence[PlannedFFN],
    sentences: Sequence[Batch],
    statistics: Mapping[str, FFNStatistics],
    seed: int,
) -> None:
    """Adds to the statistics of every FFN what its scales are fitted to; nothing, with a warning, where it cannot.

    f is a random projection of what the model puts out, as in `fidelity`; no labels are needed. One forward and one
    backward pass a sentence through the original, and as many with the stand-ins. Memory: the graph of one sentence;
    then an FFN's inputs and their gradients, in CPU memory, of `MOST_TOKENS` tokens.

    Args:
        model: the model in eval mode, showing its original FFNs.
        planned: the FFNs, and how wide they are to be.
        sentences: batches of one sentence each.
        statistics: FFN name -> what calibration found out about it.
        seed: of the projection.
    """
    if len(sentences) < 2:
        return
    try:
        side = Network(model, [p.ffn for p in planned], fused=False)
        function = random_projection(side, seed)
        originals = _gradients(side, sentences, function)
        used = sentences[: len(next(iter(originals.values())).counts)]
        kernels = {
            p.ffn.name: adam_kernels(read_ffn(p.ffn), find_activation(p.ffn), originals.pop(p.ffn.name))
            for p in planned
        }
        with _stand_ins(planned, statistics):
            narrow = _gradients(side, used, function)
    except Exception as error:  # whatever a model cannot do, the fit of the scales is a refinement
        warnings.warn(
            f"No gradients could be taken through {type(model).__name__}, so the scales of its narrow FFNs are "
            f"estimated without them: {type(error).__name__}: {error}",
            stacklevel=3,
        )
        return
    for name, tokens in narrow.items():
        statistics[name].tangents = Tangents(kernels[name], tokens)


def sequences_for(seen: int) -> int:
    """How many sentences to take gradients of after so many sequences."""
    return min(MOST_SEQUENCES, max(FEWEST_SEQUENCES, seen // 20))


def _gradients(side: Network, sentences: Sequence[Batch], function: Function) -> Gradients:
    """What goes into every FFN, and what comes back to its output, sentence by sentence until there is enough."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {ffn.name: [] for ffn in side.ffns}
    most = 0

    def evaluate(batch: Batch) -> Tensor:
        return function(side(batch, hidden_states=False), batch)

    for count, sentence in enumerate(progress(sentences, "Taking gradients")):
        if most >= MOST_TOKENS and count >= 2:  # a kernel is between sentences
            break
        for name, tokens in gradients_of_sequence(side, sentence, evaluate).items():
            found[name].append(tokens)
        most = max(sum(len(x) for x, _ in tokens) for tokens in found.values())
    return {name: TokenGradients(*joined(tokens), tuple(len(x) for x, _ in tokens)) for name, tokens in found.items()}


@contextmanager
def _stand_ins(planned: Sequence[PlannedFFN], statistics: Mapping[str, FFNStatistics]) -> Iterator[None]:
    """Every FFN puts out what a quickly made narrow one does."""
    with ExitStack() as hooks:
        for p in planned:
            if p.width < p.ffn.width:
                narrow = stand_in(read_ffn(p.ffn), p.width, statistics[p.ffn.name])

                def replace(module: nn.Module, args: tuple[Any, ...], output: Tensor, narrow: Any = narrow) -> Tensor:
                    return narrow(args[0])

                hooks.callback(p.ffn.projections[-1].register_forward_hook(replace).remove)
        yield
