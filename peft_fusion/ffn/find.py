"""Finds the FFNs of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .layouts import LAYOUTS, FFNLayout

# f(s x) = s^k f(x) for s > 0: the name of an activation's class or function -> k.
HOMOGENEITY = {"ReLU": 1, "relu": 1, "LeakyReLU": 1, "leaky_relu": 1, "ReLUSquaredActivation": 2}


@dataclass(frozen=True)
class FFN:
    """One FFN of a model: its projections and where they are.

    Args:
        name: path of the module that holds the projections ("" for the model itself).
        layout: how they are named and stored.
        holder: that module.
    """

    name: str
    layout: FFNLayout
    holder: nn.Module

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the projections below the holder, the out-projection last."""
        return self.layout.paths

    @property
    def projection_names(self) -> tuple[str, ...]:
        """Paths of the projections in the model, the out-projection last."""
        return tuple(f"{self.name}.{path}" if self.name else path for path in self.paths)

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """The modules at `paths`, as they stand in the model now (wrapped or not)."""
        return tuple(self.holder.get_submodule(path) for path in self.paths)

    @property
    def base_projections(self) -> tuple[nn.Module, ...]:
        """The original linear modules, beneath any adapter."""
        return tuple(base_of(module) for module in self.projections)

    @property
    def width(self) -> int:
        """The number of neurons."""
        return features(self.base_projections[-1])[0]

    @property
    def in_dim(self) -> int:
        """The dimension of its inputs."""
        return features(self.base_projections[0])[0]

    @property
    def out_dim(self) -> int:
        """The dimension of its outputs."""
        return features(self.base_projections[-1])[1]

    @property
    def neuron_parameters(self) -> int:
        """How many parameters belong to each neuron."""
        *ins, out = self.base_projections
        rows = [(features(m)[1] // self.width, features(m)[0] + (getattr(m, "bias", None) is not None)) for m in ins]
        return sum(count * size for count, size in rows) + features(out)[1]

    @property
    def homogeneity(self) -> int | None:
        """By which power of a positive factor a plain FFN's activation grows with its input; None where it is by none.

        A gated FFN is linear in its second piece, which is the one that is rescaled, whatever the activation.
        """
        return None if self.layout.gated else HOMOGENEITY.get(function_name(self.activation))

    @property
    def activation(self) -> Callable[[Tensor], Tensor] | None:
        """The activation function, or None where the layout does not say where it is."""
        for path in self.layout.activations:
            found = _attribute(self.holder, path)
            if callable(found):
                return found
        return None


def base_of(module: nn.Module) -> nn.Module:
    """The original module beneath any number of adapter wrappers, merged ones included."""
    while isinstance(inner := getattr(module, "original_layer", getattr(module, "base_layer", None)), nn.Module):
        module = inner
    return module


def is_projection(module: nn.Module | None) -> bool:
    """Whether a module (beneath its wrappers) is a linear map that can be read as one."""
    return module is not None and isinstance(base_of(module), (nn.Linear, Conv1D))


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of an `nn.Linear` or a `Conv1D`, from its declared sizes."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def find_ffns(model: nn.Module) -> list[FFN]:
    """Every FFN of a model whose layout is known, in the order of `model.named_modules()`.

    A module shared by several depths (ALBERT) is one FFN.

    Args:
        model: any model, with or without adapters.

    Returns:
        The FFNs; empty if there are none.
    """
    found: list[FFN] = []
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):  # what lies inside an adapter layer is not a part of the model
            continue
        layout = next((layout for layout in LAYOUTS if _may_have(module, layout) and _has_layout(module, layout)), None)
        if layout is not None:
            found.append(FFN(name, layout, module))
    return found


def unreadable_projections(model: nn.Module) -> list[str]:
    """The classes of modules that are named like an FFN's projections but are no linear modules that can be read."""
    found = set()
    for module in model.modules():
        for layout in LAYOUTS:
            projections = [_attribute(module, path) for path in layout.paths]
            modules = [projection for projection in projections if isinstance(projection, nn.Module)]
            if len(modules) == len(projections):
                found |= {type(base_of(m)).__name__ for m in modules if not is_projection(m)}
    return sorted(found)


def places(model: nn.Module) -> dict[int, list[str]]:
    """Where each module of a model is held: `id` of the module -> the path of every place.

    A module that holds others is entered once, so that more than one place means that two modules hold the same one
    (or one does twice); what lies in a block that several depths share (ALBERT) has one.
    """
    found: dict[int, list[str]] = {}
    for name, holder in model.named_modules():
        for attribute, module in holder._modules.items():
            if module is not None:
                found.setdefault(id(module), []).append(f"{name}.{attribute}" if name else attribute)
    return found


def across_neurons(ffn: FFN) -> str | None:
    """The name of what computes across this FFN's neurons, or None if nothing does."""
    for name in ffn.layout.across_neurons:
        value = getattr(ffn.holder, name, None)
        if isinstance(value, nn.Module) or (isinstance(value, (int, float)) and value):
            return name
    return None


def function_name(function: object) -> str:
    """The name of a function, or of the class of a module."""
    return getattr(function, "__name__", type(function).__name__)


def _attribute(module: nn.Module, path: str) -> object | None:
    """The attribute at a dotted path below a module, or None."""
    found: object = module
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    return found


def _may_have(module: nn.Module, layout: FFNLayout) -> bool:
    """Whether a module holds the first part of the way to an out-projection: a look that rules most modules out.

    One that finds attributes by code of its own, as PEFT's wrappers do, may have any.
    """
    return layout.out_attribute in module._modules or type(module).__getattr__ is not nn.Module.__getattr__


def _has_layout(module: nn.Module, layout: FFNLayout) -> bool:
    """Whether a module holds projections with the layout's names and with shapes that make an FFN."""
    projections = [_attribute(module, path) for path in layout.paths]
    if not all(isinstance(p, nn.Module) and is_projection(p) for p in projections):
        return False
    *ins, out = [features(base_of(p)) for p in projections if isinstance(p, nn.Module)]
    hidden = out[0] * (2 if layout.stacked else 1)
    return all(in_features == ins[0][0] and width == hidden for in_features, width in ins)
