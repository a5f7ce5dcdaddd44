"""Fusion beside LoRA in one model: the mixed tuner, and saving and loading all adapters in one call."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftMixedModel, get_peft_model_state_dict
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from .config import FusionConfig
from .guarded import GuardedTuner
from .layer import FusionLayer
from .model import FusionModel

MIXED_FILE = "mixed_adapters.json"
PREFIX = "base_model.model."


class MixedFusionModel(GuardedTuner, MixedModel):
    """PEFT's tuner for adapters of several types, with fusion among them.

    A fusion adapter is put in place by a `FusionModel` over the same model and the same configurations; what
    needs more than the layers' own methods (the checks ahead of a change, the config's width) is added here.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter of any type; see `FusionModel.inject_adapter` and `BaseTuner.inject_adapter`."""
        if isinstance(self.peft_config[adapter_name], FusionConfig):
            FusionModel.over(self).inject_adapter(self.model, adapter_name, *args, **kwargs)
        else:
            super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        self._check_merge(safe_merge, adapter_names) if merge else self._require_originals()
        for name, module in list(self.model.named_modules()):
            if isinstance(module, FusionLayer):
                plain = module.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
                self.model.set_submodule(name, plain)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)


def save_mixed(model: nn.Module, directory: str | PathLike) -> None:
    """Saves every adapter of a model, whatever their types and whichever way they were added.

    Each adapter gets a folder of its own, which `PeftModel.from_pretrained` and `load_adapter` also read, and
    `mixed_adapters.json` says in which order they were added and which are active.

    Args:
        model: a `PeftMixedModel`, a `PeftModel`, or a transformers model with adapters.
        directory: where to; made if it is not there.

    Raises:
        ValueError: if the model has no adapters.
    """
    configs: dict[str, PeftConfig] = getattr(model, "peft_config", None) or {}
    if not configs:
        raise ValueError(f"{type(model).__name__} has no adapters to save.")
    root = Path(directory)
    for name, config in configs.items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        tensors = get_peft_model_state_dict(model, adapter_name=name)
        named = {key if key.startswith(PREFIX) else PREFIX + key: tensor for key, tensor in tensors.items()}
        save_file(
            {key: tensor.contiguous() for key, tensor in named.items()},
            folder / SAFETENSORS_WEIGHTS_NAME,
            {"format": "pt"},
        )
        inference_mode, config.inference_mode = config.inference_mode, True
        try:
            config.save_pretrained(str(folder))
        finally:
            config.inference_mode = inference_mode
    listing = {"adapters": list(configs), "active": [name for name in configs if name in _active(model)]}
    (root / MIXED_FILE).write_text(json.dumps(listing, indent=2) + "\n")


def load_mixed(model: nn.Module, directory: str | PathLike, is_trainable: bool = False) -> PeftMixedModel:
    """Loads what `save_mixed` wrote.

    Args:
        model: the base model, without adapters; changed in place.
        directory: the folder that `save_mixed` wrote.
        is_trainable: whether the adapters that were active go on training.

    Returns:
        The model with every adapter in place and those active that were.

    Raises:
        ValueError: if the folder was not written by `save_mixed`, or an adapter does not fit the model.
    """
    root = Path(directory)
    if not (root / MIXED_FILE).is_file():
        raise ValueError(f"{root} has no {MIXED_FILE}: give a folder that `save_mixed` wrote.")
    listing = json.loads((root / MIXED_FILE).read_text())
    first, *others = listing["adapters"]
    mixed = PeftMixedModel.from_pretrained(model, str(root / first), first, is_trainable=is_trainable)
    for name in others:
        mixed.load_adapter(str(root / name), name, is_trainable=is_trainable)
    mixed.set_adapter(listing["active"], inference_mode=not is_trainable)
    return mixed


def _active(model: nn.Module) -> set[str]:
    """The adapters that are active on some layer."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return {name for layer in layers for name in layer.active_adapters if name in layer._get_available_adapters()}
