"""`fuse`: compression in one call, with no adapter left."""

from __future__ import annotations

from collections.abc import Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import FusionConfig
from .model import FusionModel
from .transaction import all_or_nothing


def fuse(model: nn.Module, config: FusionConfig) -> nn.Module:
    """Compresses a model in place to plain narrow modules, with no adapter left.

    What may train afterwards is what could before; then any PEFT method, LoRA on the FFNs included, applies to
    the narrow model as to any other.

    Args:
        model: the model, without adapters.
        config: what to fuse and how.

    Returns:
        The same model, its FFNs narrow and its config's width set.

    Raises:
        ValueError: if the configuration does not fit the model or it has adapters; it is unchanged then.
    """
    held = [*(getattr(model, "peft_config", None) or ())]
    if held or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has the adapters {', '.join(map(repr, held)) or '(unnamed)'}, and `fuse` leaves a "
            "plain model: merge or unload them first, or add a fusion adapter beside them by `get_peft_model`'s kin."
        )
    trainable: Mapping[str, bool] = {name: p.requires_grad for name, p in model.named_parameters()}
    with all_or_nothing(model, config):
        merged: nn.Module = FusionModel(model, config, "fused").merge_and_unload()
        vars(merged).pop("peft_config", None)
        for name, parameter in merged.named_parameters():
            parameter.requires_grad_(trainable.get(name, True))
    return merged
