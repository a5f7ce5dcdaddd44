"""`calibrate` without a configuration: the adapter that is there gets new weights, and nothing else changes."""

from __future__ import annotations

import importlib

import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME
from helpers import half, logits, train
from peft import LoraConfig, PeftModel, get_peft_model
from test_collect import batches
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_fusion import FusionConfig, calibrate, fuse

BERT, LLAMA = BY_NAME["bert"], BY_NAME["llama"]


def narrow_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "mlp_fusion_narrow" in name}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_it_gives_what_calibrating_first_gives(architecture, tmp_path):
    first = architecture.make()
    config = FusionConfig(ratio=0.5)
    calibrate(first, config, batches(architecture))
    expected = get_peft_model(first, config)
    model = get_peft_model(architecture.make(), FusionConfig(ratio=0.5))
    parameters = narrow_parameters(model)
    calibrate(model, dataloader=batches(architecture))
    assert torch.equal(logits(model, architecture), logits(expected, architecture))
    assert all(p is parameters[name] for name, p in narrow_parameters(model).items())
    assert all(p.requires_grad for p in parameters.values())
    assert model.peft_config["default"].fused_by == config.fused_by
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(architecture.make(), tmp_path)
    assert torch.equal(logits(loaded, architecture), logits(expected, architecture))


def test_an_optimizer_goes_on_with_it():
    model = get_peft_model(LLAMA.make(), half(LLAMA))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    calibrate(model, dataloader=batches(LLAMA))
    before = {name: p.detach().clone() for name, p in narrow_parameters(model).items()}
    model(**LLAMA.batch(labels=True)).loss.backward()
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in narrow_parameters(model).items())


def test_a_trainer_that_has_wrapped_the_model(tmp_path):
    model = get_peft_model(BERT.make(), half(BERT))
    row = {k: v[0] for k, v in BERT.batch(labels=True).items()}
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=[row] * 8)
    trainer.train()
    calibrate(trainer.model_wrapped, dataloader=batches(BERT))
    assert "12 sequences" in model.peft_config["default"].fused_by["calibration"]


def test_without_data_and_group_by_group():
    model = get_peft_model(LLAMA.make(), half(LLAMA))
    before = logits(model, LLAMA)
    calibrate(model, sequences=8, length=8, ffns_per_pass=1)
    assert not torch.allclose(logits(model, LLAMA), before)


def test_only_the_active_adapter_is_renewed():
    model = get_peft_model(BERT.make(), FusionConfig(ratio=0.5))
    first = logits(model, BERT)
    model.add_adapter("second", FusionConfig(ratio=0.25))
    model.set_adapter("second")
    calibrate(model, dataloader=batches(BERT))
    model.set_adapter("default")
    assert torch.equal(logits(model, BERT), first)


def test_a_mixed_model():
    model = get_peft_model(BERT.make(), FusionConfig(ratio=0.5), "ffn", mixed=True)
    model.add_adapter("lora", LoraConfig(target_modules=["query"]))
    model.set_adapter(["ffn", "lora"])
    before = logits(model, BERT)
    calibrate(model, dataloader=batches(BERT))
    assert not torch.allclose(logits(model, BERT), before)


IMPOSSIBLE = {
    "no adapter": (BERT.make, ValueError, "has no active fusion adapter to renew"),
    "another method's": (
        lambda: get_peft_model(BERT.make(), LoraConfig(target_modules=["query"])),
        ValueError,
        "has no active fusion adapter to renew",
    ),
    "fused for good": (lambda: fuse(BERT.make(), FusionConfig()), ValueError, "no active fusion adapter"),
    "low rank": (
        lambda: get_peft_model(BERT.make(), FusionConfig(method="svd")),
        ValueError,
        '`method="svd"` .* cannot be calibrated',
    ),
    "a sketch": (
        lambda: get_peft_model(BERT.make(), FusionConfig(method="sketch")),
        ValueError,
        '`method="sketch"` .* cannot be calibrated',
    ),
    "dropped originals": (
        lambda: get_peft_model(BERT.make(), FusionConfig(base_weights="discard")),
        RuntimeError,
        "original FFN weights were dropped",
    ),
    "counts": (
        lambda: get_peft_model(BERT.make(), FusionConfig(scale="counts")),
        ValueError,
        '`scale="counts"`',
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_renewed(case):
    make, error, message = IMPOSSIBLE[case]
    model = make()
    before = logits(model, BERT)
    with pytest.raises(error, match=message):
        calibrate(model, dataloader=batches(BERT))
    assert torch.equal(logits(model, BERT), before)


def test_a_merged_adapter_is_refused_and_stays_merged():
    model = get_peft_model(BERT.make(), FusionConfig())
    model.merge_adapter()
    before = logits(model, BERT)
    with pytest.raises(ValueError, match="is merged, so that it cannot be renewed. Call `unmerge_adapter"):
        calibrate(model, dataloader=batches(BERT))
    assert torch.equal(logits(model, BERT), before)


@pytest.mark.parametrize("moment", [0, 1, 4])
def test_an_interrupt_while_writing_leaves_the_adapter(moment, monkeypatch):
    in_place = importlib.import_module("peft_fusion.calibrate.in_place")
    model = get_peft_model(LLAMA.make(), half(LLAMA))
    train(model, LLAMA)
    before, record = logits(model, LLAMA), dict(model.peft_config["default"].fused_by)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    write, calls = in_place._write, iter(range(100))

    def interrupted(module, values):
        if next(calls) == moment:
            raise KeyboardInterrupt
        write(module, values)

    monkeypatch.setattr(in_place, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, dataloader=batches(LLAMA))
    assert torch.equal(logits(model, LLAMA), before)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert model.peft_config["default"].fused_by == record
