"""Everything of a model, and of torch, that a call could leave behind: what the fixture `unchanged` compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

HANDED_OVER = "_mlp_fusion_calibration"
"""The attribute in which a calibration waits on the model for the fusion."""


class Same:
    """Equal to what is the very same object; holds it, so that no other takes its place in memory."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __repr__(self) -> str:
        return f"{type(self.value).__name__} at {id(self.value):x}"


def state_of(model: nn.Module) -> dict[str, Any]:
    """Names of all there is -> what it is, to be compared by `==`.

    That is every module's attributes: its mode, all of torch's hooks, parameters and buffers with their gradients,
    configurations, adapters and what is merged; and torch's own state.
    """
    found: dict[str, Any] = {
        "torch: random state": torch.get_rng_state().numpy().tobytes(),
        "torch: gradients enabled": torch.is_grad_enabled(),
        "torch: default dtype": torch.get_default_dtype(),
    }
    for name, value in vars(nn.modules.module).items():
        if name.startswith("_global") and isinstance(value, dict):
            found[f"torch: {name}"] = frozen(value)
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"{name}: itself"] = Same(module)
        for key, value in vars(module).items():
            state = frozen(value)
            if not hasattr(type(module), key) or state != frozen(getattr(type(module), key)):  # else as if not set
                found[f"{name}.{key}"] = state
    return found


def changes(before: Mapping[str, Any], after: Mapping[str, Any], apart_from: str = "") -> list[str]:
    """The names of what appeared, disappeared or is another, in words.

    Args:
        before: from `state_of`.
        after: the same, later.
        apart_from: the end of a name that does not matter.
    """
    names = [name for name in {**before, **after} if not (apart_from and name.endswith(apart_from))]
    found = [f"{name} appeared" for name in names if name not in before]
    found += [f"{name} disappeared" for name in names if name not in after]
    return found + [f"{n} changed" for n in names if n in before and n in after and before[n] != after[n]]


def frozen(value: Any, around: tuple[int, ...] = ()) -> Any:
    """A copy that later changes do not reach, and that `==` compares: contents where they are known, else identity."""
    inner = (*around, id(value))
    if id(value) in around:
        return "itself"
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, nn.Module):
        return Same(value), [(name, _tensor(t)) for name, t in _tensors(value)] if around else None
    if isinstance(value, Mapping):
        return [(key, frozen(item, inner)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [frozen(item, inner) for item in value]
    if isinstance(value, (set, frozenset)):
        return {repr(item) for item in value}
    if isinstance(value, (PretrainedConfig, GenerationConfig, PeftConfig)) or is_dataclass(value):
        return Same(value), frozen(vars(value), inner) if not isinstance(value, type) else None
    if isinstance(value, (bool, int, str, bytes, type(None), torch.dtype, torch.device)):
        return value
    return repr(value) if isinstance(value, float) else Same(value)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _tensor(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor's identity, kind, bits, gradient and hooks."""
    kind = (tensor.dtype, tensor.device, tuple(tensor.shape), tensor.requires_grad)
    hooks = [frozen(getattr(tensor, name, None)) for name in ("_backward_hooks", "_post_accumulate_grad_hooks")]
    gradient = None if not tensor.is_leaf or tensor.grad is None else _tensor(tensor.grad)
    return Same(tensor), kind, _bits(tensor), gradient, hooks


def _bits(tensor: Tensor) -> bytes | None:
    if tensor.is_meta:
        return None
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
