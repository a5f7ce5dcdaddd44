"""What is around an FFN's projections, by names, classes and sizes; for where its code cannot be tried."""

from __future__ import annotations

from torch import nn

from .find import FFN, base_of, features, is_projection
from .storage import is_quantised

ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")  # where their classes are defined
HARMLESS = ("dropout", "droppath", "identity", "attention", "attn")  # in names of classes, in lower case


def runs_plainly(ffn: FFN) -> bool:
    """Whether what surrounds an FFN's projections can run as it stands, and is sure not to change by it."""
    inside = {id(part) for module in ffn.projections for part in module.modules()}
    others = [module for module in ffn.holder.modules() if id(module) not in inside]
    return not any(
        hasattr(module, "base_layer")  # an adapter, which may unmerge itself
        or (getattr(module, "weight", None) is not None and is_quantised(module))  # may be packed when it first runs
        for module in others
    )


def modules_between(ffn: FFN) -> list[tuple[str, nn.Module]]:
    """The modules beside an FFN's projections that may compute on its neurons: path below the holder, module.

    What has parameters, but none of the FFN's width, cannot (a norm before the in-projection, say).
    """
    holders = dict.fromkeys(path.rpartition(".")[0] for path in ffn.paths)
    beside = {
        f"{holder}.{name}" if holder else name: module
        for holder in holders
        for name, module in ffn.holder.get_submodule(holder).named_children()
    }
    widths = _widths(ffn)
    return [(path, module) for path, module in beside.items() if path not in ffn.paths and _may(ffn, module, widths)]


def attributes_between(ffn: FFN) -> list[str]:
    """The numbers that an FFN's holder has as attributes, but for the sizes of its projections."""
    sizes = {size for module in ffn.base_projections for size in features(module)}
    numbers = {name: value for name, value in vars(ffn.holder).items() if type(value) in (int, float)}
    return [name for name, value in numbers.items() if value not in sizes]


def _widths(ffn: FFN) -> set[int]:
    """The sizes by which modules that compute on an FFN's neurons are known.

    A layer that has attention of its own norms its inputs and outputs: of an FFN as wide as these, nothing is known.
    """
    (inputs, stacked), (width, outputs) = features(ffn.base_projections[0]), features(ffn.base_projections[-1])
    attends = any(_is_called(module, ("attention", "attn")) for module in ffn.holder.children())
    return {width, stacked} - ({inputs, outputs} if attends else set())


def _may(ffn: FFN, module: nn.Module, widths: set[int]) -> bool:
    """Whether a module may compute on an FFN's neurons."""
    is_activation = type(module).__module__ in ACTIVATIONS and not _is_called(module, ("softm",))
    if module is ffn.activation or is_activation or _is_called(module, HARMLESS):
        return False
    sizes = {size for part in module.modules() for size in _sizes(part)}
    return not sizes or bool(sizes & widths)


def _is_called(module: nn.Module, parts: tuple[str, ...]) -> bool:
    return any(part in type(module).__name__.lower() for part in parts)


def _sizes(module: nn.Module) -> set[int]:
    """The sizes of a module's own parameters, as declared where they are packed or partitioned."""
    if is_projection(module):
        return set(features(base_of(module)))
    shapes = [getattr(parameter, "ds_shape", parameter.shape) for parameter in module.parameters(recurse=False)]
    return {size for shape in shapes for size in shape}
