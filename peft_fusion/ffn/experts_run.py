"""Routed experts run one by one, and looked into while their model runs, whichever implementation it uses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..fusing.weights import FFNWeights
from .capture import watch
from .experts import Experts, combined
from .experts_weights import read_experts


@dataclass(frozen=True)
class Routed:
    """What one expert is given in one call of its module.

    Args:
        name: the name of the experts and, behind a dot, the index of this one.
        tokens: int64 tensor of shape (n,): which of the module's input rows, or for experts that are given tokens of
            their own (Llama 4), which of these.
        weights: tensor of shape (n,): what the router multiplies its outputs by.
        rows: how many rows there are that it might have been given.
    """

    name: str
    tokens: Tensor
    weights: Tensor
    rows: int


ExpertListener = Callable[[Routed, Tensor], Tensor | None]


@contextmanager
def capture_experts(
    found: Iterable[Experts],
    *,
    inputs: ExpertListener | None = None,
    hidden: ExpertListener | None = None,
    outputs: ExpertListener | None = None,
) -> Iterator[None]:
    """Shows what goes through original experts, call by call and expert by expert, as long as the block runs.

    Each expert that gets tokens is run by itself, beside the module, whose own implementation may never hold these
    tensors; with `outputs`, what the module puts out is made of what they put out. A listener is told who was given
    what and a tensor, and may return another to go on with in its place.

    Args:
        found: the experts.
        inputs: called with the tokens that an expert is given, shape (n, in_dim).
        hidden: called with what goes into its out-projection, (n, neurons).
        outputs: called with what comes out of its out-projection, before the router's weight, (n, out_dim).
    """
    listeners = (inputs, hidden, outputs)

    def told(experts: Experts) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            made = _run(experts, args, listeners)
            return None if outputs is None else made.to(output.dtype).view_as(output)

        return hook

    with ExitStack() as stack:
        for experts in found:
            stack.enter_context(watch([experts.module], after=told(experts)))
        yield


def run_expert(
    experts: Experts,
    weights: FFNWeights,
    x: Tensor,
    hidden: Callable[[Tensor], Tensor] | None = None,
    outputs: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What one expert puts out, before the router's weight.

    Args:
        experts: for the code between the projections, and behind them.
        weights: its weights, of any width.
        x: tensor of shape (n, in_dim).
        hidden: maps what goes into its out-projection, (n, neurons), to what goes on; None: the same.
        outputs: maps what comes out of it, (n, out_dim), likewise.

    Returns:
        Tensor of shape (n, out_dim), in the dtype of `x`.
    """
    pairs = zip(weights.in_weights, weights.in_biases, strict=True)
    put = [nn.functional.linear(x, w.to(x), None if b is None else b.to(x)) for w, b in pairs]
    inside = combined(experts, put)
    inside = inside if hidden is None else hidden(inside)
    bias = None if weights.out_bias is None else weights.out_bias.to(x)
    out = nn.functional.linear(inside, weights.out_weight.T.to(x), bias)
    return after_projection(experts.module, out if outputs is None else outputs(out))


def after_projection(module: nn.Module, outputs: Tensor) -> Tensor:
    """What is done to an expert's output before it is weighted: a norm, where there is one."""
    norm = getattr(module, "post_expert_norm", None) if getattr(module, "has_post_expert_norm", False) else None
    result: Tensor = outputs if norm is None else norm(outputs)
    return result


def is_routed(module: nn.Module) -> bool:
    """Whether experts are told which tokens are whose; else each gets its share of them, one after another."""
    _, *others = inspect.signature(module.forward).parameters.values()
    return any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in others)


def _run(experts: Experts, args: tuple[Any, ...], listeners: tuple[ExpertListener | None, ...]) -> Tensor:
    """The experts' outputs, weighted and summed up, shape (tokens, out_dim); of unrouted ones (all inputs, out_dim)."""
    on_inputs, on_hidden, on_outputs = listeners
    x: Tensor = args[0].reshape(-1, args[0].shape[-1])
    shares = [x] * experts.count if len(args) > 1 else list(x.chunk(experts.count))
    made = [x.new_zeros(len(shares[0]), experts.out_dim) for _ in range(1 if len(args) > 1 else experts.count)]
    for index, (weights, routed) in enumerate(zip(read_experts(experts), _routes(experts, shares, args), strict=True)):
        if not len(routed.tokens):
            continue

        def inside(hidden: Tensor, routed: Routed = routed) -> Tensor:
            return _or(on_hidden, routed, hidden)

        def outside(out: Tensor, routed: Routed = routed) -> Tensor:
            return _or(on_outputs, routed, out)

        own = _or(on_inputs, routed, shares[index][routed.tokens])
        out = run_expert(experts, weights, own, inside, outside)
        place = 0 if len(args) > 1 else index
        made[place] = made[place].index_add(0, routed.tokens, (out * routed.weights.unsqueeze(1)).to(made[place]))
    return torch.cat(made)


def _or(listener: ExpertListener | None, routed: Routed, tensor: Tensor) -> Tensor:
    """What a listener returns, or the tensor itself."""
    moved = None if listener is None else listener(routed, tensor)
    return tensor if moved is None else moved


def _routes(experts: Experts, shares: list[Tensor], args: tuple[Any, ...]) -> Iterator[Routed]:
    """Who is given what. Of its own share, an expert is given what is not 0: that is how Llama 4 leaves tokens out."""
    for index in range(experts.count):
        name = f"{experts.name}.{index}"
        if len(args) == 1:
            tokens = (shares[index] != 0).any(1).nonzero().squeeze(1)
            yield Routed(name, tokens, shares[index].new_ones(len(tokens)), len(shares[index]))
            continue
        chosen, weights = args[1], args[2]
        tokens, place = torch.where(chosen == index)
        yield Routed(name, tokens, weights[tokens, place], len(shares[index]))
