"""Runs a module's own code with other parts: stubs for its projections, and a shell that shares all other tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MethodType

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .find import base_of, features
from .storage import blank_like


class Stub(nn.Module):
    """Stands in for a projection: notes what goes in and comes out, and never reads the projection's weight.

    It has the attributes that hosts look at; its own weight and bias are zeros that take no memory.

    Args:
        projection: what it stands in for, beneath its adapters or not.
        answer: gives what it puts out, of shape (..., out_features), for what it is given, (..., in_features).
    """

    def __init__(self, projection: nn.Module, answer: Callable[[Stub, Tensor], Tensor]) -> None:
        super().__init__()
        base = base_of(projection)
        like = blank_like(base)
        zero = torch.zeros(1, dtype=like.dtype, device="cpu" if like.is_meta else like.device)
        self.in_features, self.out_features = self.nx, self.nf = features(base)
        sizes = (self.out_features, self.in_features)
        self.weight = zero.expand(sizes[::-1] if isinstance(base, Conv1D) else sizes)
        self.bias = None if getattr(base, "bias", None) is None else zero.expand(self.out_features)
        self.answer = answer
        self.given: list[Tensor] = []
        self.put: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features) by `answer`."""
        out = self.answer(self, x)
        self.given.append(x.clone(memory_format=torch.contiguous_format))
        self.put.append(out.clone())  # an activation may work in place
        return out


def shell_of(module: nn.Module, stubs: Mapping[int, nn.Module]) -> nn.Module:
    """A module of the same class, code and tensors, in eval mode, that may run without a trace in the original.

    Unlike `copy.deepcopy`, it copies no tensors but buffers, and has no hooks (accelerate's hold a whole state dict).
    What is on the meta device, or partitioned over processes, is a constant in it.

    Args:
        module: the original.
        stubs: `id` of a module below it -> what stands in its place.
    """
    if id(module) in stubs:
        return stubs[id(module)]
    shell = module.__new__(type(module))
    nn.Module.__init__(shell)
    owned = vars(shell).keys()
    for name, value in vars(module).items():
        if name not in owned and name != "forward":
            vars(shell)[name] = copy.copy(value) if isinstance(value, (list, dict, set)) else value
    if isinstance(patched := vars(module).get("forward"), MethodType):  # what patches one module in place (Liger)
        vars(shell)["forward"] = MethodType(patched.__func__, shell)
    vars(shell).update(
        training=False,
        _parameters={name: None if p is None else _present(p) for name, p in module._parameters.items()},
        _buffers={name: None if b is None else _present(b).clone() for name, b in module._buffers.items()},
        _modules={name: None if m is None else shell_of(m, stubs) for name, m in module._modules.items()},
    )
    return shell


def _present(tensor: Tensor) -> Tensor:
    """A tensor to compute with: itself, or a constant that takes no memory where it is not there."""
    if not tensor.is_meta and not hasattr(tensor, "ds_id"):
        return tensor
    constant = torch.full((1,), 0.5, device="cpu" if tensor.is_meta else tensor.device).to(tensor.dtype)
    return constant.expand(getattr(tensor, "ds_shape", tensor.shape))
