"""An interrupt at any moment leaves the model as it was, and the second try gives what the first would have given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from architectures import BY_NAME
from helpers import half, logits
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from peft_fusion import FusionConfig, calibrate, fuse
from peft_fusion.tuner.handover import handed_over
from peft_fusion.tuner.layer import FusionLayer
from peft_fusion.tuner.model import FusionModel

LLAMA, BERT = BY_NAME["llama"], BY_NAME["bert"]


def plain() -> nn.Module:
    return LLAMA.make()


def with_adapter() -> nn.Module:
    return get_peft_model(LLAMA.make(), half(LLAMA), "first")


def with_native_lora() -> nn.Module:
    model = LLAMA.make()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    return model


def mixed_lora() -> nn.Module:
    return get_peft_model(LLAMA.make(), LoraConfig(target_modules=["q_proj"]), "lora", mixed=True)


def added(model: nn.Module, config: FusionConfig) -> nn.Module:
    model.add_adapter("ffn", config)
    model.set_adapter("ffn")
    return model


def native(model: nn.Module, config: FusionConfig) -> nn.Module:
    model.add_adapter(config, "ffn")
    return model


WAYS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, FusionConfig], nn.Module]]] = {
    "get_peft_model": (plain, lambda model, config: get_peft_model(model, config)),
    "PeftModel.add_adapter": (with_adapter, added),
    "native": (plain, native),
    "native beside LoRA": (with_native_lora, native),
    "inject": (plain, lambda model, config: inject_adapter_in_model(config, model, "ffn")),
    "mixed": (mixed_lora, added),
    "fuse": (plain, fuse),
}
MOMENTS = {
    "while narrow weights are made": ("peft_fusion.fusing.methods.fusion.kernel_kmeans", 1),
    "at the first layer": ("peft_fusion.tuner.model.FusionModel._create_and_replace", 0),
    "among the layers": ("peft_fusion.tuner.model.FusionModel._create_and_replace", 5),
    "after a layer": ("peft_fusion.tuner.layer.FusionLayer.add_narrow", 4),
    "while weights are set aside": ("peft_fusion.tuner.layer.FusionLayer.set_aside", 3),
    "after all layers": ("peft.tuners.tuners_utils.BaseTuner._mark_only_adapters_as_trainable", 0),
}


def interrupt(monkeypatch, path: str, call: int) -> None:
    """Has the function at a path raise KeyboardInterrupt in its so-manieth call, once its work is done."""
    owner_path, _, name = path.rpartition(".")
    owners = {
        "peft_fusion.tuner.model.FusionModel": FusionModel,
        "peft_fusion.tuner.layer.FusionLayer": FusionLayer,
    }
    if owner_path == "peft.tuners.tuners_utils.BaseTuner":
        owners[owner_path] = FusionModel
    owner = owners.get(owner_path)
    original = getattr(owner, name) if owner else __import__(owner_path, fromlist=["_"]).__dict__[name]
    calls = iter(range(10**6))

    def interrupted(*args, **kwargs):
        result = original(*args, **kwargs)
        if next(calls) == call:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner if owner else __import__(owner_path, fromlist=["_"]), name, interrupted)


@lru_cache
def uninterrupted(way: str) -> torch.Tensor:
    """The logits where nothing was in the way; what becomes of the originals does not touch them."""
    make, put = WAYS[way]
    return logits(put(make(), FusionConfig(ratio=0.25)), LLAMA)


@pytest.mark.parametrize("base_weights", ["keep", "offload", "discard"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("way", WAYS)
def test_interrupted_and_tried_again(way, moment, base_weights, monkeypatch, unchanged):
    make, put = WAYS[way]
    path, call = MOMENTS[moment]
    if "set aside" in moment and base_weights == "keep":
        pytest.skip("nothing is set aside")
    config = FusionConfig(ratio=0.25, base_weights=base_weights)
    model, expected = make(), uninterrupted(way)
    before, asked = logits(model, LLAMA), copy.deepcopy(vars(config))
    check = unchanged(model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, path, call)
        put(model, config)
    check()
    assert {k: v for k, v in vars(config).items() if k in asked and k != "base_model_name_or_path"} == {
        k: v for k, v in asked.items() if k != "base_model_name_or_path"
    }
    assert torch.equal(logits(model, LLAMA), before)
    assert torch.equal(logits(put(model, config), LLAMA), expected)


@pytest.mark.parametrize("moment", [moment for moment in MOMENTS if moment != "while narrow weights are made"])
@pytest.mark.parametrize("way", ["get_peft_model", "native", "fuse"])
def test_a_calibration_survives(way, moment, monkeypatch):
    _, put = WAYS[way]
    path, call = MOMENTS[moment]
    config = FusionConfig(ratio=0.5, base_weights="offload")
    data = [BERT.batch(size=8)]

    def calibrated() -> nn.Module:
        model = BERT.make()
        calibrate(model, config, data)
        return model

    expected = logits(put(calibrated(), config), BERT)
    model = calibrated()
    made = handed_over(model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, path, call)
        put(model, config)
    assert handed_over(model) is made
    assert torch.equal(logits(put(model, config), BERT), expected)
    assert handed_over(model) is None


@pytest.mark.parametrize("action", ["merge_adapter", "merge_and_unload", "unload"])
def test_interrupted_merging(action, monkeypatch, unchanged):
    model = get_peft_model(LLAMA.make(), half(LLAMA))
    before = logits(model, LLAMA)
    width = model.config.intermediate_size
    check = unchanged(model)
    names = {"merge_adapter": "merge", "merge_and_unload": "merge", "unload": "unmerge"}
    original, calls = getattr(FusionLayer, names[action]), iter(range(100))

    def interrupted(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if next(calls) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FusionLayer, names[action], interrupted)
        getattr(model, action)()
    check()
    assert model.config.intermediate_size == width
    assert torch.equal(logits(model, LLAMA), before)


def test_fusing_over_adapters_is_refused_by_name(unchanged):
    model = with_native_lora()
    check = unchanged(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM has the adapters 'lora'.* merge or unload them first"):
        fuse(model, FusionConfig())
    check()
    with pytest.raises(ValueError, match="has the adapters 'default'"):
        fuse(get_peft_model(LLAMA.make(), half(LLAMA)), FusionConfig())
