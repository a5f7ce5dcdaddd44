"""`teacher`: the original as a plain model that takes no memory of its own."""

from __future__ import annotations

import copy
from itertools import chain

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..ffn import is_away, require_originals
from ..observe.networks import fusion_layers
from ..observe.unwrap import unwrapped
from ..tuner.layer import FusionLayer


def teacher(model: nn.Module) -> nn.Module:
    """The original of a fused model as a plain model, in eval mode, that shares every tensor with it.

    For trainers that want a teacher of their own, TRL's `DistillationTrainer` and `GKDTrainer` say. What trains in
    `model` is no part of it. It is as good as a view: what moves or changes the shared weights changes both models.

    Args:
        model: a model with adapters, fusion or others, wrapped or not. It is not changed.

    Raises:
        ValueError: if an adapter of another method is merged into its weights, or they are offloaded.
        RuntimeError: if the original weights were dropped.
    """
    host = unwrapped(model)
    for layer in fusion_layers(host):
        require_originals(layer.original_layer)
        if is_away(layer.original_layer):
            raise ValueError(
                "The original FFN weights are offloaded, and a teacher would need them in place. Fuse with "
                '`base_weights="keep"`, or use `distill`, which brings them back when it needs them.'
            )
    for name, module in host.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, FusionLayer) and module.merged:
            raise ValueError(
                f"An adapter is merged into `{name}`, so the original is not there. Call `unmerge_adapter()`."
            )
    aside = (layer.original_layer for layer in fusion_layers(host))
    tensors = chain(host.parameters(), host.buffers(), *((*m.parameters(), *m.buffers()) for m in aside))
    copied = copy.deepcopy(host, {id(tensor): tensor for tensor in tensors})
    for name, module in list(copied.named_modules()):
        if name and (plain := _plain(module)) is not module:
            copied.set_submodule(name, plain)
    for trace in ("peft_config", "_hf_peft_config_loaded"):
        vars(copied).pop(trace, None)
    return copied.eval()


def _plain(module: nn.Module) -> nn.Module:
    """A module without what PEFT put around it."""
    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        if isinstance(module, FusionLayer):
            module = module.original_layer
        else:
            module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.base_layer
    return module
