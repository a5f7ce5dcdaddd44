"""Random small models: FFNs of any layout, with any biases and activation, on a residual stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from peft_fusion.ffn import LAYOUTS, FFNLayout

HOMOGENEITY = {"relu": 1, "relu2": 2}
ACTIVATIONS = ["gelu", "silu", "tanh", *HOMOGENEITY]


class Holder(nn.Module):
    """An FFN of a layout, with the code that goes with it.

    Args:
        layout: the layout.
        dim: what goes in and comes out.
        width: the neurons.
        biases: whether the in-projections, and the out-projection, have biases.
        activation: transformers' name of it.
        transposed: whether the projections are `Conv1D`, which have biases always.
    """

    def __init__(
        self,
        layout: FFNLayout,
        dim: int,
        width: int,
        biases: tuple[bool, bool] = (True, True),
        activation: str = "gelu",
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.layout, self.name = layout, activation

        def projection(inputs: int, outputs: int, bias: bool) -> nn.Module:
            return Conv1D(outputs, inputs) if transposed else nn.Linear(inputs, outputs, bias)

        for path in layout.in_projections:
            self._put(path, projection(dim, width * (2 if layout.stacked else 1), biases[0]))
        self._put(layout.out_projection, projection(width, dim, biases[1]))
        self._put(layout.activations[0], ACT2FN[activation])

    def _put(self, path: str, module: nn.Module) -> None:
        *outer, last = path.split(".")
        holder: nn.Module = self
        for part in outer:
            if not hasattr(holder, part):
                holder.add_module(part, nn.Module())
            holder = getattr(holder, part)
        setattr(holder, last, module)

    def forward(self, x: Tensor) -> Tensor:
        pieces = [self.get_submodule(path)(x) for path in self.layout.in_projections]
        if self.layout.stacked:
            pieces = list(self.layout.split(pieces[0], -1))
        hidden = self.get_submodule(self.layout.activations[0])(pieces[0])
        return self.get_submodule(self.layout.out_projection)(hidden * pieces[1] if len(pieces) == 2 else hidden)

    def rows(self) -> list[Tensor]:
        """Views of the weights with one row a neuron, in-projections first (a stacked one's halves apart)."""
        found = []
        for path in (*self.layout.in_projections, self.layout.out_projection):
            module = self.get_submodule(path)
            weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
            if path == self.layout.out_projection:
                return [*found, weight.T]
            tensors = [weight] if module.bias is None else [weight, module.bias.data.unsqueeze(1)]
            stacked = self.layout.stacked
            halves = [half for tensor in tensors for half in self.layout.split(tensor)] if stacked else tensors
            found += halves
        raise AssertionError

    def second_rows(self) -> list[Tensor]:
        """Those of the in-projection that is not activated."""
        ins = self.rows()[:-1]
        return ins[1::2] if self.layout.stacked else ins[len(ins) // 2 :]

    def rearrange(self, neurons: Tensor) -> None:
        """Puts the neurons at the given places in the place of all."""
        for rows in self.rows():
            rows.copy_(rows[neurons])

    def rescale(self, factor: Tensor) -> None:
        """Multiplies what goes into every neuron, or its gated part, and divides what comes out, to the same effect."""
        degree = 1 if self.layout.gated else HOMOGENEITY[self.name]
        for rows in self.second_rows() if self.layout.gated else self.rows()[:-1]:
            rows.mul_(factor.unsqueeze(1))
        self.rows()[-1].div_(factor.unsqueeze(1) ** degree)


class Host(nn.Module):
    """FFNs on a residual stream: maps (tokens, dim) to (tokens, dim)."""

    def __init__(self, dim: int, ffns: Sequence[Holder], seed: int) -> None:
        super().__init__()
        self.dim, self.layers = dim, nn.ModuleList(ffns)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.double().parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x) / 5
        return x


@st.composite
def hosts(draw: st.DrawFn, symmetric: bool = False, width: int | None = None) -> Host:
    """Hosts in float64, of one or two FFNs; where asked for, all of which have a symmetry, or all of a width."""
    dim, seed = draw(st.integers(2, 7)), draw(st.integers(0, 2**31))
    ffns = []
    for _ in range(draw(st.integers(1, 2))):
        layout = draw(st.sampled_from(LAYOUTS))
        activation = draw(st.sampled_from(ACTIVATIONS if layout.gated or not symmetric else list(HOMOGENEITY)))
        neurons = draw(st.integers(6, 30)) if width is None else width
        biases, transposed = draw(st.tuples(st.booleans(), st.booleans())), draw(st.booleans())
        ffns.append(Holder(layout, dim, neurons, biases, activation, transposed))
    return Host(dim, ffns, seed)


def inputs(dim: int, tokens: int = 12, seed: int = 0) -> Tensor:
    """Inputs of a host, (tokens, dim)."""
    return torch.randn(tokens, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
