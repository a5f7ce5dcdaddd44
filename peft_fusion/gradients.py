"""Gradients by what FFNs put out, a sentence at a time, and without any weight that requires them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .ffn import FFN, blank_like, features
from .fidelity.pair import Side

MOST_LENGTH = 64
"""Tokens that count of a sentence, the first ones: a backward pass holds a whole graph."""

MAGNIFIED = 1024.0
"""f is multiplied by this, so that gradients in half precision do not vanish; the scales do not depend on it."""

Batch = Mapping[str, Tensor]


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
    return {name: joined(tokens) for name, tokens in found.items()}


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
    return {k: v[:, window] if isinstance(v, Tensor) and v.shape == ids.shape else v for k, v in sentence.items()}


def _no_tokens(ffn: FFN) -> tuple[Tensor, Tensor]:
    first, *_, out = ffn.base_projections
    dtype = blank_like(out).dtype
    return torch.zeros(0, features(first)[0], dtype=dtype), torch.zeros(0, features(out)[1], dtype=dtype)


def joined(tokens: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Pairs of tensors, one after another."""
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
