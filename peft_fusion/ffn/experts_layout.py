"""How experts store their weights in bare 3-D parameters, told by the flags of their module and by shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .originals import original_shape

BIAS = "_bias"


@dataclass(frozen=True)
class ExpertsLayout:
    """Where the weights of a layer's experts are, and in which order.

    Args:
        in_projection: name of the parameter that holds every expert's in-projection.
        out_projection: name of the one that holds the out-projections.
        gated: whether the in-projection holds gate and up.
        transposed: whether matrices are stored as (in_features, out_features).
        interleaved: whether gate and up alternate, neuron by neuron, instead of following each other.
        biased: whether both have biases.
    """

    in_projection: str
    out_projection: str
    gated: bool
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False

    @property
    def bias_names(self) -> tuple[str, str]:
        """The names of the biases, where there are any."""
        return self.in_projection + BIAS, self.out_projection + BIAS

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all parameters."""
        return (self.in_projection, self.out_projection, *(self.bias_names if self.biased else ()))

    def outputs(self, width: int) -> int:
        """How much an in-projection puts out for so many neurons."""
        return 2 * width if self.gated else width

    def split(self, rows: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """The pieces, one or two, of what belongs to an in-projection's outputs, which are counted along `dim`."""
        if not self.gated:
            return (rows,)
        if self.interleaved:
            return rows.unflatten(dim, (-1, 2)).unbind(dim + 1 if dim >= 0 else dim)
        return rows.chunk(2, dim)

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """What `split` takes apart along 1: one or two tensors (experts or tokens, neurons, ...), put together."""
        if not self.gated:
            return pieces[0]
        if self.interleaved:
            return torch.stack(list(pieces), dim=2).flatten(1, 2)
        return torch.cat(list(pieces), dim=1)

    def shapes(self, count: int, in_dim: int, width: int, out_dim: int) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters: a name -> its shape."""
        outputs = self.outputs(width)
        found: dict[str, tuple[int, ...]] = {
            self.in_projection: (count, in_dim, outputs) if self.transposed else (count, outputs, in_dim),
            self.out_projection: (count, width, out_dim) if self.transposed else (count, out_dim, width),
        }
        if self.biased:
            found |= zip(self.bias_names, ((count, outputs), (count, out_dim)), strict=True)
        return found

    def __str__(self) -> str:
        return f"experts' {self.in_projection} -> {self.out_projection}"


# (in-projection, out-projection, gated): the names that a module's own parameters have, all of them and no other.
NAMES = (("gate_up_proj", "down_proj", True), ("up_proj", "down_proj", False))


def layout_of(module: nn.Module) -> ExpertsLayout | None:
    """How a module stores experts; None if it holds none, or in a way that is not known.

    Flags of the module (`is_transposed`, `is_concatenated`) count where it has them; else shapes tell.
    """
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    for in_name, out_name, gated in NAMES:
        biased = {in_name, out_name, in_name + BIAS, out_name + BIAS} == own
        if not biased and {in_name, out_name} != own:
            continue
        for transposed in _transposed(module):
            interleaved = gated and not getattr(module, "is_concatenated", True)
            layout = ExpertsLayout(in_name, out_name, gated, transposed, interleaved, biased)
            if _fits(module, layout):
                return layout
    return None


def _transposed(module: nn.Module) -> tuple[bool, ...]:
    """The ways in which a module's matrices may be stored; where it does not say, the shapes decide."""
    flag = getattr(module, "is_transposed", None)
    return (False, True) if flag is None else (bool(flag),)


def _fits(module: nn.Module, layout: ExpertsLayout) -> bool:
    """Whether the shapes of a module's parameters are those of a layout."""
    ins, outs = (original_shape(module, name) for name in (layout.in_projection, layout.out_projection))
    if len(ins) != 3 or len(outs) != 3:
        return False
    in_dim, (width, out_dim) = ins[1 if layout.transposed else 2], outs[1:] if layout.transposed else outs[:0:-1]
    return all(
        original_shape(module, name) == shape for name, shape in layout.shapes(outs[0], in_dim, width, out_dim).items()
    )
