"""What becomes of the original FFN weights: kept, offloaded or discarded."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME
from helpers import half, logits, relative, train
from peft import PeftModel, get_peft_model

from peft_fusion.tuner.layer import FusionLayer

every = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)


def original_elements(model) -> int:
    """How many elements of original FFN weights the model holds where its parameters are."""
    layers = [m for m in model.modules() if isinstance(m, FusionLayer)]
    return sum(p.numel() for layer in layers for p in layer.base_layer.parameters())


@every
@pytest.mark.parametrize("base_weights", ["offload", "discard"])
def test_training_saving_and_merging_go_on(architecture, base_weights, tmp_path):
    reference = get_peft_model(architecture.make(), half(architecture))
    fused = get_peft_model(architecture.make(), half(architecture, base_weights=base_weights))
    assert original_elements(reference) > 0 and original_elements(fused) == 0
    for model in (reference, fused):
        train(model, architecture)
    expected = logits(reference, architecture)
    assert torch.equal(logits(fused, architecture), expected)
    fused.to("cpu").save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(architecture.make(), tmp_path)
    assert original_elements(reloaded) == 0
    assert torch.equal(logits(reloaded, architecture), expected)
    assert torch.equal(logits(copy.deepcopy(fused), architecture), expected)
    fused.merge_adapter()
    assert relative(logits(fused, architecture), expected) < 1e-5
    fused.unmerge_adapter()
    assert torch.equal(logits(fused, architecture), expected)
    assert relative(logits(fused.merge_and_unload(), architecture), expected) < 1e-5


@every
def test_offloaded_weights_come_back(architecture):
    model = architecture.make()
    original = logits(model, architecture)
    fused = get_peft_model(model, half(architecture, base_weights="offload"))
    narrow = logits(fused, architecture)
    with fused.disable_adapter():
        assert torch.equal(logits(fused, architecture), original)
    assert original_elements(fused) == 0
    assert torch.equal(logits(fused, architecture), narrow)
    fused.merge_adapter()
    with fused.disable_adapter():
        assert torch.equal(logits(fused, architecture), original)
    assert torch.equal(logits(fused, architecture), narrow)
    fused.add_adapter("second", half(architecture, seed=1))
    fused.set_adapter("second")
    assert original_elements(fused) == 0
    if architecture.task_type != "SEQ_CLS":
        assert torch.equal(logits(fused.unload(), architecture), original)


@pytest.mark.parametrize("action", ["disable", "unload", "add"])
def test_discarded_weights_are_missed_with_a_clear_error(action):
    llama = BY_NAME["llama"]
    fused = get_peft_model(llama.make(), half(llama, base_weights="discard"))
    narrow = logits(fused, llama)
    with pytest.raises(RuntimeError, match='were dropped .*base_weights="discard".*or fuse with'):
        if action == "disable":
            with fused.disable_adapter():
                pass
        elif action == "unload":
            fused.unload()
        else:
            fused.add_adapter("second", half(llama))
    assert torch.equal(logits(fused, llama), narrow)
    assert list(fused.peft_config) == ["default"]


def test_original_is_used_where_no_adapter_is_active():
    llama = BY_NAME["llama"]
    model = llama.make()
    original = logits(model, llama)
    fused = get_peft_model(model, half(llama, base_weights="offload"))
    fused.base_model.delete_adapter("default")
    assert torch.equal(logits(fused.base_model, llama), original)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama_bias", "phi3"])
@pytest.mark.parametrize("merged", [False, True])
def test_offloaded_weights_come_back_in_the_precision_that_the_model_has_by_now(name, merged):
    architecture = BY_NAME[name]
    original = logits(architecture.make().to(torch.bfloat16), architecture)
    fused = get_peft_model(architecture.make(), half(architecture, base_weights="offload"))
    if merged:
        fused.merge_adapter()
    fused.to(torch.bfloat16)
    with fused.disable_adapter():
        assert torch.equal(logits(fused, architecture), original)
    if merged:
        fused.unmerge_adapter()
    assert original_elements(fused) == 0
    fused.merge_adapter()
    fused.unmerge_adapter()
    assert logits(fused, architecture).dtype == torch.bfloat16
    plain = fused.unload()
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    if architecture.task_type != "SEQ_CLS":
        assert torch.equal(logits(plain, architecture), original)


def kept_elements(model) -> int:
    """How many elements of original FFN weights are kept in CPU memory, wherever a layer hides them."""
    modules = [layer.original_layer for layer in model.modules() if isinstance(layer, FusionLayer)]
    return sum(
        t.numel()
        for m in modules
        for v in vars(m).values()
        if isinstance(v, dict)
        for t in v.values()
        if isinstance(t, torch.Tensor)
    )


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_that_discards_after_one_that_offloads_frees_what_was_kept(merged):
    llama = BY_NAME["llama"]
    fused = get_peft_model(llama.make(), half(llama, base_weights="offload"))
    assert kept_elements(fused) > 0
    if merged:
        fused.merge_adapter()
    fused.add_adapter("second", half(llama, base_weights="discard", seed=1))
    assert kept_elements(fused) == 0
    if merged:
        fused.unmerge_adapter()
    fused.set_adapter("second")
    logits(fused, llama)
    with pytest.raises(RuntimeError, match="were dropped"):
        fused.unload()
