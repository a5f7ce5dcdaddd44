"""`teacher`: the original, every tensor shared, and nothing about the fused model changed."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME
from helpers import half, logits
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from peft_fusion import FusionConfig, teacher

LLAMA = BY_NAME["llama"]


def storages(model) -> set[int]:
    return {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_it_is_the_original_and_shares_every_tensor(architecture, unchanged):
    plain = architecture.make()
    expected = logits(plain, architecture)
    model = get_peft_model(plain, half(architecture)).train()
    check = unchanged(model)
    original = teacher(model)
    check()
    assert torch.equal(logits(original, architecture), expected)
    assert storages(original) <= storages(model)
    assert not isinstance(original, PeftModel) and not hasattr(original, "peft_config")
    assert not any(isinstance(module, BaseTunerLayer) for module in original.modules())
    assert not any(module.training for module in original.modules())
    assert type(original) is type(plain)


def test_it_does_not_follow_the_narrow_weights_but_the_shared_ones():
    model = get_peft_model(LLAMA.make(), half(LLAMA))
    original = teacher(model)
    before = logits(original, LLAMA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp_fusion_narrow" in name:
                parameter.add_(1.0)
    assert torch.equal(logits(original, LLAMA), before)
    with torch.no_grad():
        model.get_base_model().model.norm.weight.mul_(2)
    assert not torch.equal(logits(original, LLAMA), before)


def test_of_a_merged_adapter_and_of_a_native_one():
    expected = logits(LLAMA.make(), LLAMA)
    merged = get_peft_model(LLAMA.make(), half(LLAMA))
    merged.merge_adapter()
    narrow = logits(merged, LLAMA)
    original = teacher(merged)
    assert torch.equal(logits(original, LLAMA), expected)
    assert storages(original) <= storages(LLAMA.make()) | storages(original)
    assert torch.equal(logits(merged, LLAMA), narrow)
    native = LLAMA.make()
    native.add_adapter(FusionConfig(ratio=0.5))
    assert torch.equal(logits(teacher(native), LLAMA), expected)


def test_other_adapters_are_no_part_of_it():
    model = get_peft_model(LLAMA.make(), FusionConfig(ratio=0.5), mixed=True)
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter(["default", "lora"])
    assert torch.equal(logits(teacher(model), LLAMA), logits(LLAMA.make(), LLAMA))
    model.base_model.set_adapter(["lora"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="An adapter is merged into `.*q_proj`.*unmerge_adapter"):
        teacher(model)


def test_a_trained_head_is_not_the_originals():
    architecture = next(a for a in ARCHITECTURES if a.classifies)
    model = get_peft_model(architecture.make(), half(architecture, modules_to_save=["classifier"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(1.0)
    assert torch.equal(logits(teacher(model), architecture), logits(architecture.make(), architecture))


@pytest.mark.parametrize(
    ("base_weights", "error", "message"),
    [("discard", RuntimeError, "were dropped"), ("offload", ValueError, "are offloaded.*use `distill`")],
)
def test_originals_that_are_not_there_are_refused(base_weights, error, message):
    model = get_peft_model(LLAMA.make(), half(LLAMA, base_weights=base_weights))
    with pytest.raises(error, match=message):
        teacher(model)
