"""Routed experts, whose weights are bare 3-D parameters of one module: what they are, and how they are found.

The second kind of FFN, with the verbs of the first (`linear.py`): read and write in `experts_weights.py`, run and
capture in `experts_run.py`. One `Experts` is all experts of a layer: they get one width, and one module stands in for
theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .experts_layout import ExpertsLayout, layout_of
from .find import HOMOGENEITY, base_of, function_name
from .originals import original_shape
from .storage import blank_like

ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")
NOT_LINEAR = 0  # see `Experts.homogeneity`

GROUPED = 8
"""What experts' widths are multiples of: grouped matrix products in half precision take no others."""


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer.

    Args:
        name: path of the module that holds their weights.
        layout: how they are stored.
        holder: the module above.
    """

    name: str
    layout: ExpertsLayout
    holder: nn.Module

    @property
    def projection_names(self) -> tuple[str, ...]:
        """The path of the one module that is replaced."""
        return (self.name,)

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """That module, as it stands in the model now (wrapped or not)."""
        return (self.holder.get_submodule(self.name.rpartition(".")[2]),)

    @property
    def base_projections(self) -> tuple[nn.Module, ...]:
        """The original module, beneath any adapter."""
        return (base_of(self.projections[0]),)

    @property
    def module(self) -> nn.Module:
        """The original module, beneath any adapter."""
        return self.base_projections[0]

    @property
    def count(self) -> int:
        """The number of experts."""
        return self._out_shape[0]

    @property
    def width(self) -> int:
        """The number of neurons of each."""
        return self._out_shape[1 if self.layout.transposed else 2]

    @property
    def in_dim(self) -> int:
        """The dimension of their inputs."""
        return original_shape(self.module, self.layout.in_projection)[1 if self.layout.transposed else 2]

    @property
    def out_dim(self) -> int:
        """The dimension of their outputs."""
        return self._out_shape[2 if self.layout.transposed else 1]

    @property
    def neuron_parameters(self) -> int:
        """How many parameters belong to the neurons of one number, one in each expert."""
        rows = self.layout.outputs(1) * (self.in_dim + self.layout.biased)
        return self.count * (rows + self.out_dim)

    @property
    def activation(self) -> Callable[[Tensor], Tensor] | None:
        """The activation function, or None if the module has none of its own (gpt-oss)."""
        found = (getattr(self.module, name, None) for name in ACTIVATIONS)
        return next((function for function in found if callable(function)), None)

    @property
    def homogeneity(self) -> int | None:
        """As `FFN.homogeneity`; 0 where gated experts are not linear in their second piece and have no symmetry."""
        if self.layout.gated:
            return None if is_linear_in_second(self) else NOT_LINEAR
        return HOMOGENEITY.get(function_name(self.activation))

    @property
    def like(self) -> Tensor:
        """An empty tensor on the device and in the precision that stand-ins for their weights get."""
        return blank_like(self.module, self.layout.in_projection)

    @property
    def _out_shape(self) -> tuple[int, ...]:
        return original_shape(self.module, self.layout.out_projection)


@dataclass(frozen=True)
class Expert:
    """One of the routed experts of a layer, as an FFN by itself.

    Args:
        experts: all of the layer.
        index: which of them.
    """

    experts: Experts
    index: int

    @property
    def name(self) -> str:
        """The name of the experts and, behind a dot, its index."""
        return f"{self.experts.name}.{self.index}"

    @property
    def width(self) -> int:
        """The number of neurons."""
        return self.experts.width

    @property
    def in_dim(self) -> int:
        """The dimension of its inputs."""
        return self.experts.in_dim

    @property
    def out_dim(self) -> int:
        """The dimension of its outputs."""
        return self.experts.out_dim

    @property
    def homogeneity(self) -> int | None:
        """As `Experts.homogeneity`."""
        return self.experts.homogeneity


def find_experts(model: nn.Module) -> list[Experts]:
    """The routed experts of a model that are stored as bare 3-D parameters, in the order of its modules.

    Args:
        model: any model, with or without adapters.
    """
    found: list[Experts] = []
    wrapped: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(wrapped or ("\0",)):
            continue
        base = base_of(module)
        if base is not module:  # what lies inside an adapter layer is not a part of the model
            wrapped = (*wrapped, f"{name}.")
        layout = layout_of(base)
        if layout is not None:
            found.append(Experts(name, layout, model.get_submodule(name.rpartition(".")[0])))
    return found


def hidden_activations(experts: Experts, put: Tensor) -> Tensor:
    """What goes into an expert's out-projection.

    Args:
        experts: for the code between the projections.
        put: what its in-projection puts out, in its order, shape (..., outputs).

    Returns:
        Tensor of shape (..., neurons).
    """
    gate: Callable[[Tensor], Tensor] | None = getattr(experts.module, "_apply_gate", None)
    if experts.layout.gated and gate is not None:
        return gate(put)
    assert experts.activation is not None  # else they would have been refused
    if not experts.layout.gated:
        return experts.activation(put)
    first, second = experts.layout.split(put, dim=-1)
    return experts.activation(first) * second


def combined(experts: Experts, pieces: Sequence[Tensor]) -> Tensor:
    """What goes into an expert's out-projection.

    Args:
        experts: for the code between the projections.
        pieces: what its in-projection puts out, gate and up by themselves, one or two tensors (tokens, neurons).

    Returns:
        Tensor of shape (tokens, neurons).
    """
    return hidden_activations(experts, experts.layout.join(pieces))


def is_linear_in_second(experts: Experts) -> bool:
    """Whether twice the second piece, or its opposite, gives just that of a gated expert's hidden activations."""
    generator = torch.Generator().manual_seed(0)
    pieces = 5 * torch.randn(2, 64, generator=generator)  # wide enough for clamps at 7 or 10 to show
    pieces = pieces.to(experts.like.device if not experts.like.is_meta else "cpu")
    with torch.no_grad():
        once, twice, opposite = (
            hidden_activations(experts, experts.layout.join([pieces[:1], factor * pieces[1:]])) for factor in (1, 2, -1)
        )
    return torch.equal(twice, 2 * once) and torch.equal(opposite, -once)
