"""What PEFT promises about adapters, one behaviour a function, for any architecture."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from architectures import Architecture
from helpers import half, logits, relative, train
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn

from peft_fusion import FusionConfig
from peft_fusion.tuner.layer import FusionLayer

MERGED = 2e-5  # relative error that folding the scale and another order of summation may make


def two_adapters(architecture: Architecture) -> PeftModel:
    """A model with the adapter "default" of half width and "second" of a quarter, the former active."""
    model = get_peft_model(architecture.make(), half(architecture))
    model.add_adapter("second", FusionConfig(ratio=0.25, task_type=architecture.task_type))
    return model


def outputs_of(model: PeftModel, architecture: Architecture, adapter: str) -> torch.Tensor:
    """The logits under an adapter; the one that was active is active again afterwards."""
    before = model.active_adapter
    model.set_adapter(adapter)
    result = logits(model, architecture)
    model.set_adapter(before)
    return result


def merged_adapters(model: nn.Module) -> set[str]:
    """What is merged on the fused layers; a classifier in `modules_to_save` never is."""
    return {name for m in model.modules() if isinstance(m, FusionLayer) for name in m.merged_adapters}


def narrow_weights(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    layers = [m for m in model.modules() if isinstance(m, FusionLayer)]
    return [p for layer in layers for p in layer.mlp_fusion_narrow[adapter].parameters()]


def adding_changes_nothing(architecture: Architecture, folder: Path) -> None:
    model = get_peft_model(architecture.make(), half(architecture))
    before = logits(model, architecture)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    model.add_adapter("second", half(architecture, seed=3))
    assert model.active_adapter == "default"
    assert torch.equal(logits(model, architecture), before)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable


def setting_switches_outputs_and_gradients(architecture: Architecture, folder: Path) -> None:
    model = two_adapters(architecture)
    first = logits(model, architecture)
    model.set_adapter("second")
    assert not torch.allclose(logits(model, architecture), first)
    assert all(p.requires_grad for p in narrow_weights(model, "second"))
    assert not any(p.requires_grad for p in narrow_weights(model, "default"))
    model.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model, architecture), first)
    with pytest.raises(ValueError, match="nosuch"):
        model.set_adapter("nosuch")


def inactive_adapters_do_not_train(architecture: Architecture, folder: Path) -> None:
    model = two_adapters(architecture)
    second = outputs_of(model, architecture, "second")
    train(model, architecture)
    if architecture.task_type != "SEQ_CLS":  # the classifiers differ
        assert torch.equal(outputs_of(model, architecture, "second"), second)
    assert all(p.grad is None for p in narrow_weights(model, "second"))


def deleting_the_active_adapter(architecture: Architecture, folder: Path) -> None:
    model = two_adapters(architecture)
    second = outputs_of(model, architecture, "second")
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("default")
    assert list(model.peft_config) == ["second"] and model.active_adapters == ["second"]
    model.set_adapter("second")
    assert torch.equal(logits(model, architecture), second)
    assert not any("default" in name for name in model.state_dict())


def deleting_the_last_adapter(architecture: Architecture, folder: Path) -> None:
    model = architecture.make()
    original = logits(model, architecture)
    config = FusionConfig(ratio=0.5)  # no task type: PEFT itself adds none where a classifier was deleted
    model = get_peft_model(model, config)
    expected = logits(model, architecture)
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model, architecture), original)
    model.add_adapter("again", config)
    model.set_adapter("again")
    assert torch.equal(logits(model, architecture), expected)


def disabling(architecture: Architecture, folder: Path) -> None:
    model = architecture.make()
    original = logits(model, architecture)
    model = get_peft_model(model, half(architecture))
    narrow = logits(model, architecture)
    with model.disable_adapter():
        assert torch.equal(logits(model, architecture), original)
        assert not any(p.requires_grad for p in narrow_weights(model, "default"))
    assert torch.equal(logits(model, architecture), narrow)
    assert all(p.requires_grad for p in narrow_weights(model, "default"))
    model.disable_adapter_layers()
    assert torch.equal(logits(model, architecture), original)
    model.enable_adapter_layers()
    assert torch.equal(logits(model, architecture), narrow)


def merging_a_named_adapter(architecture: Architecture, folder: Path) -> None:
    model = two_adapters(architecture)
    first, second = logits(model, architecture), outputs_of(model, architecture, "second")
    merged = copy.deepcopy(model)
    merged.merge_adapter(["second"])
    if architecture.task_type != "SEQ_CLS":  # the classifier follows the active adapter
        assert relative(logits(merged, architecture), second) < MERGED
    assert merged_adapters(merged) == {"second"}
    merged.unmerge_adapter()
    assert torch.equal(logits(merged, architecture), first)
    with pytest.raises(ValueError, match="while they are merged"):
        merged.merge_adapter(["second"])
        merged.delete_adapter("second")
    with pytest.raises(ValueError, match="cannot be active or merged together"):
        model.merge_adapter(["default", "second"])
    assert torch.equal(logits(model, architecture), first)
    assert not merged_adapters(model)


def adding_and_setting_while_merged(architecture: Architecture, folder: Path) -> None:
    model = get_peft_model(architecture.make(), half(architecture))
    first = logits(model, architecture)
    expected = outputs_of(two_adapters(architecture), architecture, "second")
    model.merge_adapter()
    model.add_adapter("second", FusionConfig(ratio=0.25, task_type=architecture.task_type))
    assert relative(logits(model, architecture), first) < MERGED
    model.set_adapter("second")
    assert torch.equal(logits(model, architecture), expected)
    model.set_adapter("default")
    assert torch.equal(logits(model, architecture), first)


def merging_and_unloading_a_named_adapter(architecture: Architecture, folder: Path) -> None:
    model = two_adapters(architecture)
    model.set_adapter("second")
    second = logits(model, architecture)
    model.set_adapter("default")
    if architecture.task_type == "SEQ_CLS":
        model.set_adapter("second")
    merged = model.merge_and_unload(safe_merge=True, adapter_names=["second"])
    assert relative(logits(merged, architecture), second) < MERGED
    assert getattr(merged.config, architecture.attribute) == architecture.width // 4


def safe_merging_refuses_nan_and_changes_nothing(architecture: Architecture, folder: Path) -> None:
    model = get_peft_model(architecture.make(), half(architecture))
    weight = narrow_weights(model, "default")[-1]
    with torch.no_grad():
        weight.view(-1)[0] = torch.nan
    names = [(name, id(module)) for name, module in model.named_modules()]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaNs detected"):
            merge(safe_merge=True)
        assert [(name, id(module)) for name, module in model.named_modules()] == names
        assert not merged_adapters(model)


def unloading_and_fusing_again(architecture: Architecture, folder: Path) -> None:
    model = get_peft_model(architecture.make(), half(architecture, base_weights="offload"))
    expected = logits(model, architecture)
    plain = model.unload()
    assert not hasattr(plain, "peft_config")
    again = logits(get_peft_model(plain, half(architecture)), architecture)
    if architecture.task_type != "SEQ_CLS":  # unloading keeps a trained classifier, as with LoRA
        assert torch.equal(again, expected)
    else:
        assert relative(again, expected) < MERGED


def low_cpu_mem_usage(architecture: Architecture, folder: Path) -> None:
    model = get_peft_model(architecture.make(), half(architecture, seed=2))
    train(model, architecture)
    expected = logits(model, architecture)
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(architecture.make(), folder, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded, architecture), expected)
    other = get_peft_model(architecture.make(), half(architecture))
    other.load_adapter(folder, "second", low_cpu_mem_usage=True)
    other.set_adapter("second")
    assert torch.equal(logits(other, architecture), expected)
    other.add_adapter("third", half(architecture), low_cpu_mem_usage=True)
    assert all(p.is_meta for p in narrow_weights(other, "third"))
    set_peft_model_state_dict(other, load_file(folder / "adapter_model.safetensors"), "third", low_cpu_mem_usage=True)
    other.set_adapter("third")
    assert torch.equal(logits(other, architecture), expected)


def injection_driven_by_a_state_dict(architecture: Architecture, folder: Path) -> None:
    model = inject_adapter_in_model(half(architecture), architecture.make())
    expected, state = logits(model, architecture), get_peft_model_state_dict(model)
    for low in (False, True):
        config = FusionConfig(ratio=0.25, task_type=architecture.task_type)
        other = inject_adapter_in_model(config, architecture.make(), state_dict=state, low_cpu_mem_usage=low)
        result = set_peft_model_state_dict(other, state, low_cpu_mem_usage=low)
        assert not result.unexpected_keys
        assert torch.equal(logits(other, architecture), expected)


def status(architecture: Architecture, folder: Path) -> None:
    model = two_adapters(architecture)
    whole, layers = model.get_model_status(), model.get_layer_status()
    assert whole.peft_types == {"default": "MLP_FUSION", "second": "MLP_FUSION"}
    assert whole.adapter_model_type == "FusionModel" and whole.base_model_type == architecture.model_class
    assert whole.enabled is True and whole.active_adapters == ["default"] and whole.merged_adapters == []
    assert whole.requires_grad == {"default": True, "second": False}
    assert whole.available_adapters == ["default", "second"] and whole.devices == {
        "default": ["cpu"],
        "second": ["cpu"],
    }
    fused = [m for m in model.modules() if isinstance(m, FusionLayer)]
    assert len([layer for layer in layers if layer.module_type == "mlp_fusion.FusionLayer"]) == len(fused)
    assert whole.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.merge_adapter()
    assert merged_adapters(model) == {"default"}
    model.unmerge_adapter()
    model.disable_adapter_layers()
    assert model.get_model_status().enabled is False


def saving_selected_adapters(architecture: Architecture, folder: Path) -> None:
    model = two_adapters(architecture)
    second = outputs_of(model, architecture, "second")
    model.save_pretrained(folder, selected_adapters=["second"])
    assert [p.name for p in folder.iterdir() if p.is_dir()] == ["second"]
    assert not (folder / "adapter_config.json").exists()
    reloaded = PeftModel.from_pretrained(architecture.make(), folder / "second", adapter_name="other")
    assert torch.equal(logits(reloaded, architecture), second)


def pickling_and_copying(architecture: Architecture, folder: Path) -> None:
    model = get_peft_model(architecture.make(), half(architecture))
    train(model, architecture)
    expected = logits(model, architecture)
    torch.save(model, folder / "model.pt")
    loaded = torch.load(folder / "model.pt", weights_only=False)
    for other in (loaded, copy.deepcopy(model)):
        assert torch.equal(logits(other, architecture), expected)
        assert type(other.peft_config["default"]) is FusionConfig
        other.merge_adapter()
        assert relative(logits(other, architecture), expected) < MERGED
    torch.save(model.state_dict(), folder / "state.pt")
    fresh = get_peft_model(architecture.make(seed=4), half(architecture, init_weights=False))
    fresh.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    assert torch.equal(logits(fresh, architecture), expected)


ADAPTERS = [
    adding_changes_nothing,
    setting_switches_outputs_and_gradients,
    inactive_adapters_do_not_train,
    deleting_the_active_adapter,
    deleting_the_last_adapter,
    disabling,
    merging_a_named_adapter,
    adding_and_setting_while_merged,
    merging_and_unloading_a_named_adapter,
    safe_merging_refuses_nan_and_changes_nothing,
    unloading_and_fusing_again,
    low_cpu_mem_usage,
    injection_driven_by_a_state_dict,
    status,
    saving_selected_adapters,
    pickling_and_copying,
]
