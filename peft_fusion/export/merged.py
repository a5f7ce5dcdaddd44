"""A plain model with every active adapter merged, made beside a model that nothing happens to."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..ffn import AnyFFN, base_of, dense_parameter, features, find_all, is_quantised, restore, stock_class, stock_config
from ..tuner.experts import ExpertsLayer, NarrowExperts
from ..tuner.layer import FusionLayer
from ..tuner.narrow import NarrowOutProjection
from .offloaded import fetch, fetched_in_saving, without_weights

LEFT_OUT = ("_hf_peft_config_loaded", "peft_config", "hf_quantizer", "is_quantized", "quantization_method")
"""What marks a model as one with adapters, or as quantised (a gguf file's stays so once its weights are plain)."""


def check_mergeable(host: nn.Module) -> None:
    """Refuses models whose adapters cannot be merged into plain weights that are all here.

    Args:
        host: the model, unwrapped.

    Raises:
        ValueError: saying why, and what to do.
    """
    if not isinstance(host, PreTrainedModel):
        raise ValueError(
            f"`export` writes checkpoints of transformers models, but got {type(host).__name__}. Merge it "
            "(`merge_and_unload()`) and save its state dict."
        )
    tuned = [m for m in host.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if any(module.disable_adapters for module in tuned):
        raise ValueError("The model's adapters are disabled, so what to export is unclear. Enable them first.")
    layers = [module for module in tuned if isinstance(module, FusionLayer)]
    if layers and not any(layer.active_narrow is not None or layer.merged for layer in layers):
        names = sorted({name for layer in layers for name in layer.mlp_fusion_narrow})
        raise ValueError(f"None of the fusion adapters {names} is active. Choose one with `set_adapter`.")
    _check_weights(host)


def _check_weights(host: nn.Module) -> None:
    """Refuses weights that are neither plain tensors in this process nor fetched by accelerate's hooks.

    Raises:
        ValueError: naming one.
    """
    for name, module in host.named_modules():
        if isinstance(module, nn.Linear) and is_quantised(module):
            raise ValueError(
                f"`{name}` is quantised, and a narrow FFN cannot be merged into a quantised checkpoint. Load the "
                "model unquantised, put the adapter on it (`PeftModel.from_pretrained`), and export that."
            )
    for name, tensor in (*host.named_parameters(), *host.named_buffers()):
        if hasattr(tensor, "ds_id") or type(tensor.data) is not Tensor:
            raise ValueError(
                f"`{name}` is sharded over processes ({type(tensor).__name__}). Save the adapter, load it in a single "
                "process, and export that."
            )
    if empty := without_weights(host):
        raise ValueError(
            f"`{empty}` has no weights: it is on the meta device, and no hook of accelerate's fetches it. Load the "
            "model with `from_pretrained`, and export that."
        )


def merged_widths(host: nn.Module) -> dict[str, tuple[int, int]]:
    """What the FFNs of a model come to: name -> its width without and with its active adapters."""
    return {ffn.name: (ffn.width, _merged_width(ffn)) for ffn in find_all(host)}


def _merged_width(ffn: AnyFFN) -> int:
    out = ffn.projections[-1]
    if isinstance(out, ExpertsLayer):
        experts = out.active_narrow
        return experts.width if isinstance(experts, NarrowExperts) else ffn.width
    if isinstance(out, FusionLayer) and out.merged:
        return features(out.base_layer)[0]
    narrow = out.active_narrow if isinstance(out, FusionLayer) else None
    return int(narrow.weight.shape[1]) if isinstance(narrow, NarrowOutProjection) else ffn.width


def merged_copy(host: PreTrainedModel) -> PreTrainedModel:
    """A plain model of transformers' own class that computes what another does with its active adapters.

    Its modules, configs and the weights that merging makes are its own; all other weights are the other model's, in
    the same memory. It is there to be saved, not to be run: hooks and patched forwards are those of the other.

    Args:
        host: the model; it stays as it is.

    Returns:
        The copy.
    """
    copied: Any = _plain(_structure(host, {}))
    copied.__class__, copied.config = stock_class(host), stock_config(host)
    for name in LEFT_OUT:
        vars(copied).pop(name, None)
    if hasattr(copied.config, "quantization_config"):
        del copied.config.quantization_config
    fetched_in_saving(copied)
    _untie(copied)
    return copied


def active_configs(host: nn.Module) -> list[PeftConfig]:
    """The configurations of the adapters that are active on some layer."""
    tuned = [m for m in host.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    active = {name for m in tuned for name in m.active_adapters if name in m._get_available_adapters()}
    return [config for name, config in (getattr(host, "peft_config", None) or {}).items() if name in active]


def _structure(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """The same modules anew, with containers and configs of their own, around the same tensors."""
    if id(module) in memo:
        known: nn.Module = memo[id(module)]
        return known
    copied = memo[id(module)] = module.__class__.__new__(module.__class__)
    for name, value in vars(module).items():
        if name == "_modules":
            value = {key: None if child is None else _structure(child, memo) for key, child in value.items()}
        elif isinstance(value, (PreTrainedConfig, GenerationConfig)):
            value = copy.deepcopy(value, memo)
        elif isinstance(value, (dict, list, set)):
            value = copy.copy(value)
        vars(copied)[name] = value
    return copied


def _plain(module: nn.Module) -> nn.Module:
    """Merges the adapters of a copied structure, from a module downwards; returns what takes the module's place."""
    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        module = _without_adapter(module)
    for name, child in module._modules.items():
        module._modules[name] = None if child is None else _plain(child)
    return module


def _without_adapter(layer: Any) -> nn.Module:
    """What one adapter layer of a copied structure comes to."""
    if not isinstance(layer, FusionLayer):
        own_weights(layer)
        if hasattr(layer, "unload_and_optionally_merge_module"):
            return layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        layer.merge(safe_merge=True)
        return layer.get_base_layer()
    base: nn.Module = layer.base_layer
    if layer.merged or layer.active_narrow is None:
        restore(base)
        return base
    active: list[str] = layer.active_adapters  # type: ignore[assignment]
    name = next(name for name in active if name in layer.mlp_fusion_narrow)
    fetch(layer.mlp_fusion_narrow[name])
    return layer.plain(name)


def own_weights(layer: nn.Module) -> None:
    """Gives what lies beneath an adapter of another method weights of its own, for that merges in place."""
    fetch(layer)
    for module in base_of(layer).modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fresh = parameter.detach().clone()
                module._parameters[name] = nn.Parameter(fresh, requires_grad=parameter.requires_grad)


def _untie(model: Any) -> None:
    """Has the config say so where merging has parted the embeddings, whose weights were one."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    try:
        into, out = model.get_input_embeddings(), model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return
    if out is None or out.weight is into.weight:
        return
    if (into.weight.is_meta or out.weight.is_meta) and torch.equal(*(_values(module) for module in (into, out))):
        out.weight = into.weight  # they were parted by being sent elsewhere, each by itself
    else:
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}


def _values(embedding: nn.Module) -> Tensor:
    values = dense_parameter(embedding, "weight")
    assert values is not None
    return values.cpu()
