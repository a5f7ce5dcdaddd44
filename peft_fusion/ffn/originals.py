"""What becomes of a projection's original weights once a narrow one stands in for it.

They can stay where they are, move to CPU memory, or be dropped. A projection without its weights keeps empty
parameters of the same dtype on the same device, for there is code that looks at them (T5 reads `wo.weight.dtype`),
and meta tensors would make `Trainer`'s `.to()` fail.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .storage import dense_parameter

_AWAY = "_mlp_fusion_originals"  # on the module: name -> tensor in CPU memory, or an empty dict once dropped
_SHAPES = "_mlp_fusion_shapes"  # beside it: name -> shape, for what does not declare its sizes otherwise


def offload(module: nn.Module, keep: bool) -> None:
    """Replaces a projection's parameters by empty ones.

    Args:
        module: the projection; what it kept earlier is dropped, too, where nothing is to be kept any more.
        keep: whether the originals stay in CPU memory, for `restore`.
    """
    if is_away(module):
        if not keep:
            setattr(module, _AWAY, {})
        return
    originals = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
    setattr(module, _SHAPES, {name: tuple(tensor.shape) for name, tensor in originals.items()})
    setattr(module, _AWAY, {name: tensor.cpu() for name, tensor in originals.items()} if keep else {})
    for name, tensor in originals.items():
        _set(module, name, torch.empty(0, dtype=tensor.dtype, device=tensor.device))


def restore(module: nn.Module) -> None:
    """Puts a projection's original parameters back, on the device and in the precision that it is in by now.

    Does nothing if they never left.

    Raises:
        RuntimeError: if they were dropped.
    """
    require_originals(module)
    if not is_away(module):
        return
    for name, tensor in getattr(module, _AWAY).items():
        _set(module, name, tensor.to(getattr(module, name)))
    delattr(module, _AWAY)
    delattr(module, _SHAPES)


def require_originals(module: nn.Module) -> None:
    """Refuses what needs a projection's original weights.

    Raises:
        RuntimeError: if they were dropped.
    """
    if is_dropped(module):
        raise RuntimeError(
            'The original FFN weights were dropped (`base_weights="discard"`), so the original model cannot be '
            'had back, nor further adapters made of it. Load it anew, or fuse with `base_weights="keep"` or "offload".'
        )


def is_away(module: nn.Module) -> bool:
    """Whether a projection's original parameters are not in it."""
    return hasattr(module, _AWAY)


def is_dropped(module: nn.Module) -> bool:
    """Whether a projection's original parameters are gone for good."""
    return getattr(module, _AWAY, None) == {}


def original_parameter(module: nn.Module, name: str) -> Tensor | None:
    """A projection's original parameter, wherever and however it is stored; None if it never had one of that name.

    Raises:
        RuntimeError: if it was dropped.
    """
    require_originals(module)
    if is_away(module):
        tensor: Tensor | None = getattr(module, _AWAY).get(name)
        return tensor
    return dense_parameter(module, name)


def original_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of a module's original parameter, wherever it is; () if it has none of that name."""
    known: dict[str, tuple[int, ...]] = getattr(module, _SHAPES, {})
    parameter = module._parameters.get(name)
    if parameter is None:
        return ()
    return known.get(name) or tuple(getattr(parameter, "ds_shape", parameter.shape))


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
