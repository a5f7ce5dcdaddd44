"""The tangent kernels of a model's FFN weights over a set of sequences.

A pass over the sequences keeps what goes into the projections of a few FFNs, and the gradients of what comes out; then
the kernels of one projection after the other are made of them (`fusing/gradient_kernels.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ffn import FFN, watch
from ..fusing.gradient_kernels import gradient_kernels
from ..observe.batches import Batch
from ..observe.networks import Network, linear_modules
from ..observe.projection import Function
from ..progress import progress
from ..tuner.narrow import LowRankProjection, NarrowInProjection, NarrowOutProjection

Token = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Kernels:
    """The tangent kernels of some weights over n sequences.

    Args:
        adam: <grad f(x_n), sign grad f(x_m)>, float64 of shape (n, n) on the CPU.
        sgd: <grad f(x_n), grad f(x_m)>, the same.
    """

    adam: Tensor
    sgd: Tensor

    def __add__(self, other: Kernels) -> Kernels:
        return Kernels(self.adam + other.adam, self.sgd + other.sgd)


def tangent_kernels(
    network: Network, sequences: Sequence[Batch], function: Function, memory: int
) -> dict[tuple[str, str], Kernels]:
    """The kernels of every projection of a network's dense FFNs.

    Args:
        network: the network; its weights are those it runs with, the narrow ones of a fused network.
        sequences: batches of one sequence each.
        function: maps the model's output and the sequence to a tensor of one element, f.
        memory: bytes for the activations and gradients that are kept at a time; where those of one FFN need more,
            it gets a pass of its own. Passes are what less memory costs.

    Returns:
        (FFN's name, projection's path) -> its kernels.

    Raises:
        ValueError: if the model does not take a sequence.
    """
    kernels: dict[tuple[str, str], Kernels] = {}
    if not network.dense:
        return kernels
    with network.running():
        passes = _passes(network, sequences, function, memory)
        steps = progress([(ffns, i) for ffns in passes for i in range(len(sequences))], "Tangent kernels")
        kept: list[dict[nn.Module, Token]] = []
        for ffns, index in steps:
            kept.append(_token_gradients(network, ffns, sequences[index], function))
            if len(kept) < len(sequences):
                continue
            for ffn in ffns:
                for path, module in zip(ffn.paths, ffn.projections, strict=True):
                    parts = [_kernels_of(linear, kept) for linear in linear_modules(module, network.fused)]
                    kernels[ffn.name, path] = sum(parts[1:], parts[0])
            kept = []
    return kernels


def _passes(network: Network, sequences: Sequence[Batch], function: Function, memory: int) -> list[list[FFN]]:
    """The FFNs in groups whose activations fit the memory, judged by what the first sequence needs."""
    first = _token_gradients(network, network.dense, sequences[0], function)
    factor = sum(map(_positions, sequences)) / _positions(sequences[0])
    passes: list[list[FFN]] = [[]]
    used = 0.0
    for ffn in network.dense:
        modules = [linear for module in ffn.projections for linear in linear_modules(module, network.fused)]
        tensors = [tensor for module in modules if module in first for tensor in first[module]]
        need = factor * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if passes[-1] and used + need > memory:
            passes.append([])
            used = 0.0
        passes[-1].append(ffn)
        used += need
    return passes


def _positions(sequence: Batch) -> int:
    """How long a sequence is, in any unit."""
    mask = sequence.get("attention_mask")
    if isinstance(mask, Tensor):
        return int(mask.sum()) or 1
    return max(next(value.shape[1] if value.dim() > 1 else 1 for value in sequence.values()), 1)


def _token_gradients(network: Network, ffns: list[FFN], sequence: Batch, function: Function) -> dict[nn.Module, Token]:
    """For each linear module that f depends on, what goes in (t, in) and the gradient of what comes out (t, out).

    Tokens without a gradient, padding above all, are left out: they add nothing.
    """
    modules = {linear for ffn in ffns for p in ffn.projections for linear in linear_modules(p, network.fused)}
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    with torch.enable_grad(), _recording(modules, calls):
        value = function(network(sequence), sequence).sum()
        gradients = torch.autograd.grad(value, [output for _, _, output in calls], allow_unused=True)
    found: dict[nn.Module, list[Token]] = {}
    for (module, x, _), gradient in zip(calls, gradients, strict=True):
        if gradient is None:
            continue
        x, gradient = x.detach().flatten(0, -2), gradient.flatten(0, -2)
        acts = (gradient != 0).any(1)
        found.setdefault(module, []).append((x[acts], gradient[acts]))
    return {
        module: (torch.cat([x for x, _ in tokens]), torch.cat([gradient for _, gradient in tokens]))
        for module, tokens in found.items()
    }


def _recording(modules: set[nn.Module], calls: list[tuple[nn.Module, Tensor, Tensor]]) -> AbstractContextManager[None]:
    """Notes every call of the modules, with an output that gradients can be taken of though no weight requires one."""

    def begin(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return None if args[0].requires_grad else (args[0].detach().requires_grad_(), *args[1:])

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        calls.append((module, args[0], output))

    return watch(modules, before=begin, after=note)


def _kernels_of(module: nn.Module, kept: Sequence[dict[nn.Module, Token]]) -> Kernels:
    """One linear module's kernels; a sequence that does not reach it, as it may an expert, has no tokens there."""
    kernels = Kernels(*torch.zeros(2, len(kept), len(kept), dtype=torch.float64))
    reached = next((one[module] for one in kept if module in one), None)
    if reached is None:
        return kernels
    nothing = (reached[0][:0], reached[1][:0])
    seen = [_as_weights_see_them(module, *one.get(module, nothing)) for one in kept]
    for tokens in zip(*seen, strict=True):  # of every sequence, for one weight after the other
        kernels += Kernels(*gradient_kernels(*zip(*tokens, strict=True)))
    return kernels


def _as_weights_see_them(module: nn.Module, x: Tensor, gradient: Tensor) -> list[Token]:
    """What goes into each of a module's weights, and the gradient of what comes out of it, in float32 at least.

    A bias is a weight whose input is 1. A scale stands between a narrow projection's weight and what goes in or comes
    out; a low-rank projection has two weights, one behind the other.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, gradient = x.to(dtype), gradient.to(dtype)
    further: list[Token] = []
    if isinstance(module, LowRankProjection):
        further = [(x, gradient @ module.weight.to(dtype))]
        x = x @ module.weight_in.to(dtype).T
    elif isinstance(module, NarrowOutProjection) and module.scale is not None:
        x = x * module.scale.to(dtype)
    elif isinstance(module, NarrowInProjection) and module.scale is not None:
        gradient = gradient * module.scale.to(dtype)
    if getattr(module, "bias", None) is not None:
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    return [(x, gradient), *further]
