"""How a projection stores its parameters: plainly, quantised, partitioned over processes (DeepSpeed ZeRO-3), or away.

Away means that accelerate has dispatched the model: the weights lie in CPU memory or on disk, and a hook fetches them
for each forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx
from torch import Tensor, nn


def is_quantised(module: nn.Module) -> bool:
    """Whether a linear module's weight is not a matrix of numbers to compute with."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return True
    return not weight.is_floating_point() or weight.element_size() < 2 or type(weight).__module__.startswith("torchao")


def is_partitioned(module: nn.Module) -> bool:
    """Whether each process holds only a part of a module's parameters, which then look empty."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False))


def fetching_hook(module: nn.Module) -> AlignDevicesHook | None:
    """Accelerate's hook that fetches a module's weights for its forward pass; None if they are in it all the time."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return next((h for h in hooks if isinstance(h, AlignDevicesHook) and h.offload), None)


def keep_away(module: nn.Module, beneath: bool) -> None:
    """Has PEFT leave a projection's weights where they lie while a narrow one stands in for it, or no longer so.

    Before it merges a layer PEFT fetches what is beneath it, and afterwards stores that anew as the layer's result;
    what narrow weights are merged to is another module. It does not do so where hooks are in a sequence.

    Args:
        module: the projection.
        beneath: whether a narrow one stands in for it.
    """
    hook = getattr(module, "_hf_hook", None)
    if beneath and fetching_hook(module) is not None and not isinstance(hook, SequentialHook):
        module._hf_hook = SequentialHook(hook)
    elif not beneath and isinstance(hook, SequentialHook) and len(hook.hooks) == 1:
        module._hf_hook = hook.hooks[0]


def dense_parameter(module: nn.Module, name: str) -> Tensor | None:
    """A parameter of a projection as a plain tensor, detached; None if there is none of that name.

    A view of the parameter where it is stored plainly, else a dequantised, gathered or fetched copy of it.

    Raises:
        ValueError: if it is quantised in a form that cannot be undone.
    """
    parameter = getattr(module, name, None)
    if parameter is None:
        return None
    hook = fetching_hook(module)
    if parameter.is_meta and hook is not None and hook.weights_map is not None:
        fetched: Tensor = hook.weights_map[name].to(hook.execution_device)
        return fetched.detach()
    if hasattr(parameter, "ds_id"):
        with gather_params_ctx([parameter], modifier_rank=None):
            gathered: Tensor = parameter.detach().clone()
        return gathered
    if name == "weight" and is_quantised(module):
        return _dequantised(module)
    tensor: Tensor = parameter.detach()
    return tensor


def _dequantised(module: nn.Module) -> Tensor:
    weight = module.weight
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            f"A {type(module).__name__} was packed for the CPU in its first forward pass, which bitsandbytes cannot "
            "undo. Load the model anew and fuse it before that, or fuse it on a GPU."
        )
    dense: Tensor = dequantize_module_weight(module).detach()
    module.weight = weight  # on the CPU PEFT's helper leaves an 8-bit weight without its statistics in its place
    return dense


def blank_like(module: nn.Module, name: str = "weight") -> Tensor:
    """An empty tensor on the device and in the precision that stand-ins for a module's parameter get."""
    weight = getattr(module, name)
    assert isinstance(weight, Tensor)
    dtype = weight.dtype
    if not weight.is_floating_point() or weight.element_size() < 2:
        dtype = getattr(getattr(weight, "quant_state", None), "dtype", torch.float32)
    hook = fetching_hook(module)
    return torch.empty(0, dtype=dtype, device=weight.device if hook is None else hook.execution_device)


def check_can_leave(modules: Mapping[str, nn.Module], base_weights: str) -> None:
    """Refuses to offload parameters that are no plain tensors.

    Args:
        modules: an FFN's projections, or its experts, by name.
        base_weights: the configuration's.

    Raises:
        ValueError: naming the projection and its class.
    """
    for name, module in modules.items() if base_weights == "offload" else ():
        fetched = fetching_hook(module) is not None
        if fetched or (hasattr(module, "weight") and is_quantised(module)) or is_partitioned(module):
            kind = "partitioned over processes" if is_partitioned(module) else "quantised"
            kind = "offloaded by accelerate already" if fetched else kind
            raise ValueError(
                f'`base_weights="offload"` cannot move `{name}` ({type(module).__name__}), whose weight is {kind}. '
                'Choose "keep" or "discard".'
            )
