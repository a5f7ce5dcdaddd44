"""PEFT's contract as a matrix: every behaviour on every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters import ADAPTERS
from architectures import ARCHITECTURES, BY_NAME, Architecture
from helpers import half, logits
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from running import LONG, RUNNING

from peft_fusion import FusionConfig


@pytest.mark.parametrize(
    "behaviour",
    [*ADAPTERS, *RUNNING, *(pytest.param(b, marks=pytest.mark.common) for b in LONG)],
    ids=lambda b: b.__name__,
)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_contract(architecture: Architecture, behaviour, tmp_path: Path):
    behaviour(architecture, tmp_path)


@pytest.mark.parametrize(
    "name",
    ["mlp", "weight", "bias", "scale", "layers", "model", "0", "narrow", "mlp_fusion_narrow", "été", "my adapter"],
)
def test_adapters_of_any_name(name: str, tmp_path: Path):
    llama = BY_NAME["llama_bias"]
    model = get_peft_model(llama.make(), half(llama), adapter_name=name)
    first = logits(model, llama)
    model.add_adapter("other", FusionConfig(ratio=0.25, task_type="CAUSAL_LM"))
    assert {len(get_peft_model_state_dict(model, adapter_name=n)) for n in (name, "other")} == {3 * 7}
    model.set_adapter("other")
    other = logits(model, llama)
    model.save_pretrained(tmp_path)
    for adapter, expected in ((name, first), ("other", other)):
        loaded = PeftModel.from_pretrained(llama.make(), tmp_path / adapter, adapter_name=adapter)
        assert torch.equal(logits(loaded, llama), expected)
    model.delete_adapter("other")
    model.set_adapter(name)
    assert torch.equal(logits(model, llama), first)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "forward", "type"])
def test_names_that_torch_cannot_give(name: str, unchanged):
    llama = BY_NAME["llama"]
    model = llama.make()
    check = unchanged(model)
    with pytest.raises(ValueError, match=f"An adapter cannot be named {name!r}"):
        get_peft_model(model, half(llama), adapter_name=name)
    check()


def test_composite_heads_are_trained_and_saved(tmp_path: Path):
    """RobertaClassificationHead is one module of several layers under `modules_to_save`."""
    roberta = BY_NAME["roberta"]
    model = get_peft_model(roberta.make(), half(roberta))
    head = [n for n, p in model.named_parameters() if "classifier.modules_to_save.default" in n and p.requires_grad]
    assert len(head) == 4
    model.add_adapter("second", half(roberta, seed=1))
    model.set_adapter("second")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "modules_to_save.default" in n)
    second = logits(model, roberta)
    merged = model.merge_and_unload()
    assert type(merged.classifier).__name__ == "RobertaClassificationHead"
    torch.testing.assert_close(logits(merged, roberta), second)


def test_other_methods_are_unaffected():
    llama = BY_NAME["llama"]
    model = get_peft_model(llama.make(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 3 * 7
    model.add_adapter("second", LoraConfig(target_modules=["up_proj"]))
    torch.testing.assert_close(logits(model.merge_and_unload(), llama), logits(llama.make(), llama))
