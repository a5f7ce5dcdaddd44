"""Gradients by what FFNs put out, a sequence at a time, and without any weight that requires them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ffn import FFN, blank_like, features
from .batches import Batch, shortened
from .networks import Network

MAGNIFIED = 1024.0
"""f is multiplied by this, so that gradients in half precision do not vanish; the scales do not depend on it."""


def gradients_of_sequence(
    side: Network, sequence: Batch, evaluate: Callable[[Batch], Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """What goes into every FFN, and the gradients by what it puts out.

    Args:
        side: the model in eval mode, and its FFNs.
        sequence: a batch of one sequence, of which the first `MOST_LENGTH` tokens count.
        evaluate: maps the batch to the number whose gradients are taken, by running the model.

    Returns:
        FFN name -> its inputs (tokens, in_dim) and gradients (tokens, out_dim), `MAGNIFIED`, in CPU memory. Tokens
        without a gradient, padding above all, are left out.
    """
    keep_labels = side.is_encoder_decoder and "decoder_input_ids" not in sequence
    batch = shortened({key: value for key, value in sequence.items() if key != "labels" or keep_labels})
    calls: list[tuple[str, Tensor, Tensor]] = []
    with torch.enable_grad(), _recording(side.ffns, calls):
        value = evaluate(batch) * MAGNIFIED
        gradients = torch.autograd.grad(value, [output for _, _, output in calls], allow_unused=True)
    found = {ffn.name: [_no_tokens(ffn)] for ffn in side.ffns}  # all that an expert may get of a sequence
    for (name, x, output), gradient in zip(calls, gradients, strict=True):
        d = (torch.zeros_like(output) if gradient is None else gradient).flatten(0, -2)
        acts = (d != 0).any(1)
        found[name].append((x.detach().flatten(0, -2)[acts].cpu(), d[acts].cpu()))
    return {name: joined(tokens) for name, tokens in found.items()}


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
