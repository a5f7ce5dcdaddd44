"""Runs an FFN's own code with stubs for its projections, and compares what reaches the last with the layout.

No weight of an FFN is read, however large, quantised or partitioned it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .find import FFN, function_name
from .linear import hidden_activations
from .stubs import Stub, shell_of

TOKENS = 3
SPREAD = 5.0  # of what in-projections put out: wide enough for clamps at 7 or 10 to show
MOVED = 11.0  # what is put in the place of one neuron's value


class NotReached(RuntimeError):
    """The code ran without its projections."""


@dataclass(frozen=True)
class Run:
    """One run of an FFN's own code: the FFN with stubs in it, these, and the tensors that the code returned."""

    ffn: FFN
    ins: list[Stub]
    out: Stub
    returned: list[Tensor]


def run_with_stubs(ffn: FFN, fill: Callable[[Tensor], Tensor | None], moved: bool = False) -> Run:
    """Runs the code of an FFN's holder on random input; neither it nor torch's global random state is touched.

    Args:
        ffn: the FFN.
        fill: makes the arguments whose meaning is not known, from the input of shape (1, tokens, in_dim).
        moved: whether one neuron at a middle token has another value, and what is multiplied with the activation is
            doubled; the rest is the same in every run.

    Raises:
        NotReached: if the code called none of the projections.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(stub: Stub, x: Tensor) -> Tensor:
        z = SPREAD * torch.randn(*x.shape[:-1], stub.out_features, generator=generator, device="cpu")
        if moved and stub is ins[0]:
            _middle(z)[_watched(ffn)] = MOVED
        if moved and ffn.layout.gated:
            z[..., ffn.width if stub is ins[0] else 0 :] *= 2
        return z.to(stub.weight)

    def zeros(stub: Stub, x: Tensor) -> Tensor:
        return stub.weight.new_zeros(*x.shape[:-1], stub.out_features)

    ins, out = [Stub(module, draw) for module in ffn.projections[:-1]], Stub(ffn.projections[-1], zeros)
    modules = zip(ffn.projections, (*ins, out), strict=True)
    shell = shell_of(ffn.holder, {id(module): stub for module, stub in modules})
    x = torch.randn(1, TOKENS, ins[0].in_features, generator=generator, device="cpu").to(ins[0].weight)
    with torch.no_grad(), torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        returned = shell.forward(x, **{name: fill(x) for name in _further_arguments(shell)})
    if not any(stub.given for stub in (*ins, out)):
        raise NotReached(f"{type(ffn.holder).__name__} called none of its projections.")
    return Run(FFN(ffn.name, ffn.layout, shell), ins, out, list(_tensors(returned)))


def difference(run: Run, moved: Run) -> str | None:
    """What an FFN's code does otherwise than its layout says, in words, or None.

    Args:
        run: a run.
        moved: the run of the same FFN with what is moved in it.
    """
    out = run.ffn.paths[-1]
    if len({len(stub.given) for stub in (*run.ins, run.out)}) > 1:
        return "its projections are not all called, or not equally often"
    for call, hidden in enumerate(run.out.given):
        if any(not _same(stub.given[call], run.ins[0].given[call]) for stub in run.ins):
            return "its in-projections are not given the same"
        if not _is_by_layout(run, hidden, moved.out.given[call], call):
            return f"what reaches `{out}` is not {_formula(run.ffn)}"
    if not all(map(_same, run.returned, moved.returned)):
        return f"what its in-projections put out goes elsewhere than through `{out}`, too"
    return None


def _is_by_layout(run: Run, hidden: Tensor, moved: Tensor, call: int) -> bool:
    """Whether the out-projection is given, neuron by neuron, the activation, times the second piece if gated.

    Where the activation is not known it may be any, so long as one neuron moves nothing but itself.
    """
    put = [stub.put[call] for stub in run.ins]
    if run.ffn.activation is not None:
        return _close(hidden, hidden_activations(run.ffn, put))
    if hidden.shape != (*put[0].shape[:-1], run.ffn.width):
        return False
    expected = hidden * (2 if run.ffn.layout.gated else 1)
    _middle(expected)[_watched(run.ffn)] = _middle(moved)[_watched(run.ffn)]
    return _same(moved, expected)  # doubling is exact


def _formula(ffn: FFN) -> str:
    """What the out-projection is to be given, in words."""
    activation = "an activation" if ffn.activation is None else function_name(ffn.activation)
    if ffn.layout.stacked:
        return f"{activation} of the first half of `{ffn.paths[0]}` times the second"
    return f"{activation} of " + " times ".join(f"`{path}`" for path in ffn.paths[:-1])


def _watched(ffn: FFN) -> int:
    """The neuron that is moved; where gate and up are interleaved, it is another's place."""
    return ffn.width // 2


def _middle(z: Tensor) -> Tensor:
    """A view of what is at the token in the middle, with others before and behind."""
    rows = z.view(-1, z.shape[-1])
    return rows[len(rows) // 2]


def _further_arguments(module: nn.Module) -> list[str]:
    """The arguments that a module's forward needs beside the first."""
    _, *others = inspect.signature(module.forward).parameters.values()
    return [p.name for p in others if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _close(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors are equal but for rounding in the coarser of their precisions."""
    tolerance = max(torch.finfo(tensor.dtype).eps for tensor in (found, wanted)) ** 0.5
    if found.shape != wanted.shape:
        return False
    return torch.allclose(found.float(), wanted.float(), rtol=tolerance, atol=tolerance, equal_nan=True)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what a forward returned."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
