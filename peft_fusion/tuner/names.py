"""Adapters' names: which can be given, and what is left where one was refused."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from peft import PeftConfig
from torch import nn


def check_name(name: str, held: Mapping[str, PeftConfig] = MappingProxyType({})) -> None:
    """Refuses a name that torch cannot give to a submodule, or that another adapter of the model has.

    Raises:
        ValueError: if it is empty, has a dot in it, is an attribute of `nn.ModuleDict`, or taken.
    """
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"An adapter cannot be named {name!r}: the name must not be empty, have a dot in it, or be an attribute "
            'of `torch.nn.ModuleDict` ("keys", "forward", ...). Choose another `adapter_name`.'
        )
    if name in held:
        raise ValueError(f"The model already has an adapter named {name!r}. Give this one another `adapter_name`.")


def forget_refused_adapter(model: nn.Module) -> None:
    """Takes back transformers' note that a model has adapters, if the first one was refused.

    `add_adapter` and `load_adapter` set it before they try, and would then fail on the corrected second try.
    """
    if not getattr(model, "peft_config", None):
        vars(model).pop("_hf_peft_config_loaded", None)  # the class says that there are none
