"""Gradients by what FFNs put out, a sequence at a time, and without any weight that requires them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..ffn import OneFFN, Routed, capture_each, like_of, networks_of
from .batches import Batch, shortened, unlabelled
from .networks import Network, is_out_of_memory
from .recomputed import Recomputed

Tokens = tuple[Tensor, Tensor]
"""What goes into an FFN, (tokens, in_dim), and the gradients by what it puts out, (tokens, out_dim)."""


class NoGradients(RuntimeError):
    """A model through which no gradients can be taken, by the nature of its modules."""


def gradients_of_sequence(
    network: Network, sequence: Batch, evaluate: Callable[[Batch], Tensor], magnified: float
) -> dict[str, Tokens]:
    """What goes into every FFN and every expert, and the gradients by what its out-projection puts out.

    What an expert puts out is multiplied by the router's weight afterwards, so that its gradients hold that weight.

    Memory: the graph is that of one layer, and what goes into the others (see `Recomputed`).

    Args:
        network: the model in eval mode, and its FFNs.
        sequence: a batch of one sequence, of which the first `MOST_LENGTH` tokens count.
        evaluate: maps the batch to the number whose gradients are taken, by running the model.
        magnified: what the gradients are multiplied by, so that they do not vanish in half precision.

    Returns:
        Name of a dense FFN or of an expert -> its tokens, in CPU memory. Tokens without a gradient, padding above all,
        are left out.

    Raises:
        NoGradients: if there are none, or they are not finite.
    """
    batch = shortened(unlabelled(sequence, network.is_encoder_decoder))
    inputs: dict[str, Tensor] = {}
    calls: list[tuple[str, Tensor, Tensor]] = []

    layers = Recomputed.of(network.model)

    def note_input(name: str, x: Tensor, routed: Routed | None) -> None:
        inputs[name] = x.detach()

    def note_output(name: str, output: Tensor, routed: Routed | None) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        x = inputs.pop(name)
        if not layers.again:
            calls.append((name, x, output))
        return output.clone()  # some models add to it in place

    with torch.enable_grad(), layers.running(), capture_each(network.ffns, inputs=note_input, outputs=note_output):
        value = evaluate(batch) * magnified
        gradients = _gradients(value, [output for _, _, output in calls])
    ones = (one for ffn in network.ffns for one in networks_of(ffn))
    found = {one.name: [_no_tokens(one)] for one in ones}  # all that an expert may get of a sequence
    for (name, x, output), gradient in zip(calls, gradients, strict=True):
        d = (torch.zeros_like(output) if gradient is None else gradient).flatten(0, -2)
        acts = (d != 0).any(1)
        found[name].append((x.flatten(0, -2)[acts].cpu(), d[acts].cpu()))
    return {name: joined(tokens) for name, tokens in found.items()}


def joined(tokens: Sequence[Tokens]) -> Tokens:
    """Tokens, one after another."""
    return torch.cat([x for x, _ in tokens]), torch.cat([d for _, d in tokens])


def _gradients(value: Tensor, outputs: list[Tensor]) -> Sequence[Tensor | None]:
    if not value.requires_grad:
        raise NoGradients("its output does not depend on its FFNs in a way that autograd follows")
    try:
        gradients = torch.autograd.grad(value, outputs, allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:  # a module without a backward pass
        if is_out_of_memory(error):
            raise
        raise NoGradients(f"{type(error).__name__}: {error}") from error
    if not _finite(gradient for gradient in gradients if gradient is not None):
        raise NoGradients("gradients are not finite")
    return gradients


def _finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers are; each device is waited for once."""
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device, []).append(tensor.isfinite().all())
    return all(bool(torch.stack(of_device).all()) for of_device in found.values())


def _no_tokens(ffn: OneFFN) -> Tokens:
    dtype = like_of(ffn).dtype
    return torch.zeros(0, ffn.in_dim, dtype=dtype), torch.zeros(0, ffn.out_dim, dtype=dtype)
