"""Weights that accelerate keeps elsewhere, in CPU memory or on disk, and fetches for each forward pass.

They are on the meta device in between. `save_pretrained` fetches them shard by shard, by the hooks of their modules.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..ffn import dense_parameter, fetching_hook

HOOK = "_hf_hook"
DEVICE_MAP = "hf_device_map"


def without_weights(host: nn.Module) -> str | None:
    """The name of a parameter or buffer that has no values anywhere; None where there is none."""
    fetched = tuple(f"{name}." if name else "" for name, module in host.named_modules() if fetching_hook(module))
    held = dict(host.named_buffers()) | dict(host.named_parameters())
    return next((name for name, tensor in held.items() if tensor.is_meta and not name.startswith(fetched)), None)


def fetch(copied: nn.Module) -> None:
    """Puts what is elsewhere into the modules of a copied structure, for that is about to be merged."""
    for module in copied.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in stores:
            for name, tensor in held.items():
                if tensor is not None and tensor.is_meta and (values := dense_parameter(module, name)) is not None:
                    trains = tensor.requires_grad
                    held[name] = nn.Parameter(values, trains) if isinstance(tensor, nn.Parameter) else values
        vars(module).pop(HOOK, None)


def fetched_in_saving(copied: Any) -> None:
    """Has `save_pretrained` fetch what is elsewhere, and leaves no other hook, which it would stumble over.

    Args:
        copied: a structure of its own, whose modules' attributes are no other model's; adapters are merged.
    """
    vars(copied).pop(DEVICE_MAP, None)
    for module in copied.modules():
        hook = fetching_hook(module)
        vars(module).pop(HOOK, None)
        if hook is not None:
            vars(module)[HOOK] = hook
    if any(tensor.is_meta for tensor in copied.state_dict().values()):
        vars(copied)[DEVICE_MAP] = {"": "cpu"}  # what it looks at to know
