"""Gradients for calibration: what the original's tangent kernels are, and what narrow FFNs would get back.

A narrow FFN's kernel depends on what goes into it and on the gradient that comes back to it, and both change once
all FFNs are narrow: sentences look more alike, and so do their gradients. So the original's kernels are taken of the
original, and what the narrow FFNs are compared by of the model with quick stand-ins in place of its FFNs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .ffn import FFN, blank_like, features, find_activation, read_ffn
from .fidelity.function import Function, random_projection
from .fidelity.pair import Side
from .fusing.gradient_kernels import TokenGradients, adam_kernels
from .fusing.stand_in import stand_in
from .fusing.statistics import FFNStatistics
from .fusing.tangent import Tangents
from .plan import PlannedFFN
from .progress import progress

MOST_SENTENCES, FEWEST_SENTENCES = 24, 6
"""Sentences to take gradients of: one of 20 that calibration sees, within these bounds."""

MOST_LENGTH, MOST_TOKENS = 64, 1024
"""Tokens that count of a sentence, the first ones, and of all together: a backward pass holds a whole graph."""

MAGNIFIED = 1024.0
"""f is multiplied by this, so that gradients in half precision do not vanish; the scales do not depend on it."""

Batch = Mapping[str, Tensor]
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
        side = Side(model, [p.ffn for p in planned], fused=False)
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


def sentences_for(seen: int) -> int:
    """How many sentences to take gradients of after so many sequences."""
    return min(MOST_SENTENCES, max(FEWEST_SENTENCES, seen // 20))


def _gradients(side: Side, sentences: Sequence[Batch], function: Function) -> Gradients:
    """What goes into every FFN, and what comes back to its output, sentence by sentence until there is enough."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {ffn.name: [] for ffn in side.ffns}
    most = 0

    def evaluate(batch: Batch) -> Tensor:
        return function(side(batch, hidden_states=False), batch)

    for count, sentence in enumerate(progress(sentences, "Taking gradients")):
        if most >= MOST_TOKENS and count >= 2:  # a kernel is between sentences
            break
        for name, tokens in gradients_of_sentence(side, sentence, evaluate).items():
            found[name].append(tokens)
        most = max(sum(len(x) for x, _ in tokens) for tokens in found.values())
    return {name: TokenGradients(*_joined(tokens), tuple(len(x) for x, _ in tokens)) for name, tokens in found.items()}


def gradients_of_sentence(
    side: Side, sentence: Batch, evaluate: Callable[[Batch], Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """What goes into every FFN, and the gradients by what it puts out.

    Args:
        side: the model in eval mode, and its FFNs.
        sentence: a batch of one sentence, of which the first `MOST_LENGTH` tokens count.
        evaluate: maps the batch to the number whose gradients are taken, by running the model.

    Returns:
        FFN name -> its inputs (tokens, in_dim) and gradients (tokens, out_dim), `MAGNIFIED`, in CPU memory. Tokens
        without a gradient, padding above all, are left out.
    """
    keep_labels = side.decodes and "decoder_input_ids" not in sentence
    batch = _shortened({key: value for key, value in sentence.items() if key != "labels" or keep_labels})
    calls: list[tuple[str, Tensor, Tensor]] = []
    with torch.enable_grad(), _recording(side.ffns, calls):
        value = evaluate(batch) * MAGNIFIED
        gradients = torch.autograd.grad(value, [output for _, _, output in calls], allow_unused=True)
    found = {ffn.name: [_no_tokens(ffn)] for ffn in side.ffns}  # all that an expert may get of a sentence
    for (name, x, output), gradient in zip(calls, gradients, strict=True):
        d = (torch.zeros_like(output) if gradient is None else gradient).flatten(0, -2)
        acts = (d != 0).any(1)
        found[name].append((x.detach().flatten(0, -2)[acts].cpu(), d[acts].cpu()))
    return {name: _joined(tokens) for name, tokens in found.items()}


def single_sentences(batch: Batch, first: int = 0, step: int = 1) -> Iterator[Batch]:
    """Every `step`-th of a batch's sequences as a batch of its own; copies, so that the others need not be kept."""
    size = next(len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim())
    for i in range(first, size, step):
        yield {
            k: v[i : i + 1].clone() if isinstance(v, Tensor) and v.dim() and len(v) == size else v
            for k, v in batch.items()
        }


def _shortened(sentence: Batch) -> Batch:
    """A batch of one text, cut to its first tokens that are not padding; other inputs stay as they are."""
    ids, mask = sentence.get("input_ids"), sentence.get("attention_mask")
    if ids is None or ids.dim() != 2:
        return sentence
    start = int(mask[0].argmax()) if mask is not None and mask.shape == ids.shape else 0
    window = slice(start, start + MOST_LENGTH)
    return {k: v[:, window] if v.dim() == 2 and v.shape == ids.shape else v for k, v in sentence.items()}


def _no_tokens(ffn: FFN) -> tuple[Tensor, Tensor]:
    first, *_, out = ffn.base_projections
    dtype = blank_like(out).dtype
    return torch.zeros(0, features(first)[0], dtype=dtype), torch.zeros(0, features(out)[1], dtype=dtype)


def _joined(tokens: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in tokens]), torch.cat([d for _, d in tokens])


@contextmanager
def _recording(ffns: Sequence[FFN], calls: list[tuple[str, Tensor, Tensor]]) -> Iterator[None]:
    """Notes every call of the FFNs, with an output that gradients can be taken of though no weight requires one."""
    with ExitStack() as hooks:
        for ffn in ffns:
            inputs: list[Tensor] = []
            first, *_, out = ffn.projections
            hooks.callback(first.register_forward_pre_hook(_note_input(inputs)).remove)
            hooks.callback(out.register_forward_hook(_note_output(ffn.name, inputs, calls)).remove)
        yield


def _note_input(inputs: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])

    return hook


def _note_output(
    name: str, inputs: list[Tensor], calls: list[tuple[str, Tensor, Tensor]]
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        calls.append((name, inputs.pop(), output))
        return output.clone()  # some models add to it in place

    return hook


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
