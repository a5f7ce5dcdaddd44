"""Models that accelerate dispatched: what lies in CPU memory or on disk is fetched, and all is as it is in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from architectures import BY_NAME
from helpers import half, logits, train
from peft import PeftModel, get_peft_model
from transformers import TrainingArguments

from peft_fusion import FusionConfig, calibrate, distill, fidelity, fuse, tune_layers

LLAMA = BY_NAME["llama"]
PLACES = {
    "disk": {"model.layers.1": "disk", "model.layers.2": "disk"},
    "all on disk": {"model.layers.0": "disk", "model.layers.1": "disk", "model.layers.2": "disk", "lm_head": "disk"},
}
dispatched = pytest.mark.parametrize("where", PLACES)


def away(where: str, folder: Path, architecture=LLAMA):
    """A model of which parts lie on disk, and are run on the CPU."""
    rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", *(f"model.layers.{i}" for i in range(3)))
    places = dict.fromkeys(rest, "cpu") | PLACES[where]
    model = dispatch_model(architecture.make(), places, main_device="cpu", offload_dir=folder / "away")
    assert any(parameter.is_meta for parameter in model.parameters())
    return model


def batches(count: int = 8) -> list[dict[str, torch.Tensor]]:
    return [LLAMA.batch(seed=seed, size=4) for seed in range(count)]


@dispatched
@pytest.mark.parametrize("method", ["fusion", "pruning", "svd"])
def test_fused_trained_merged(where, method, tmp_path):
    config = half(LLAMA, method=method)
    here, there = (
        get_peft_model(LLAMA.make(), config),
        get_peft_model(away(where, tmp_path), half(LLAMA, method=method)),
    )
    assert torch.equal(logits(there, LLAMA), logits(here, LLAMA))
    with there.disable_adapter():
        assert torch.equal(logits(there, LLAMA), logits(LLAMA.make(), LLAMA))
    train(here, LLAMA), train(there, LLAMA)
    torch.testing.assert_close(logits(there, LLAMA), logits(here, LLAMA))
    there.merge_adapter()
    torch.testing.assert_close(logits(there, LLAMA), logits(here, LLAMA))
    there.unmerge_adapter()
    torch.testing.assert_close(logits(there, LLAMA), logits(here, LLAMA))
    torch.testing.assert_close(logits(there.merge_and_unload(), LLAMA), logits(here, LLAMA))


@dispatched
@pytest.mark.parametrize(("allocation", "refit"), [("uniform", "auto"), ("fisher", "auto"), ("fisher", "sequential")])
def test_calibrated(where, allocation, refit, tmp_path):
    config, other = (FusionConfig(ratio=0.5, allocation=allocation, refit=refit, multiple_of=4) for _ in range(2))
    here, there = LLAMA.make(), away(where, tmp_path)
    calibrate(here, config, batches(3))
    calibrate(there, other, batches(3), ffns_per_pass=1)
    expected = logits(get_peft_model(here, config), LLAMA)
    torch.testing.assert_close(logits(get_peft_model(there, other), LLAMA), expected)
    assert config.fused_widths == other.fused_widths


@dispatched
def test_saved_and_loaded(where, tmp_path):
    trained = get_peft_model(away(where, tmp_path), half(LLAMA))
    train(trained, LLAMA)
    trained.save_pretrained(tmp_path / "adapter")
    here = PeftModel.from_pretrained(LLAMA.make(), tmp_path / "adapter")
    assert torch.equal(logits(here, LLAMA), logits(trained, LLAMA))
    there = PeftModel.from_pretrained(away(where, tmp_path / "again"), tmp_path / "adapter")
    assert torch.equal(logits(there, LLAMA), logits(trained, LLAMA))


@dispatched
def test_the_verbs(where, tmp_path):
    here, there = get_peft_model(LLAMA.make(), half(LLAMA)), get_peft_model(away(where, tmp_path), half(LLAMA))
    reports = [fidelity(model, batches(2)) for model in (here, there)]
    assert reports[0].divergence == pytest.approx(reports[1].divergence, rel=1e-5)
    assert reports[0].ntk.adam.relative == pytest.approx(reports[1].ntk.adam.relative, rel=1e-5)
    assert reports[0].parameters == reports[1].parameters
    settings = {"max_steps": 3, "report_to": "none", "use_cpu": True, "save_strategy": "no", "learning_rate": 3e-3}
    found = [distill(m, batches(), args=TrainingArguments(str(tmp_path), **settings)) for m in (here, there)]
    assert found[0].after == pytest.approx(found[1].after, rel=1e-4)
    for model in (here, there):
        tune_layers(model, batches(), steps=5)
    torch.testing.assert_close(logits(there, LLAMA), logits(here, LLAMA))


@dispatched
def test_fused_for_good(where, tmp_path):
    there = fuse(away(where, tmp_path), half(LLAMA))
    torch.testing.assert_close(logits(there, LLAMA), logits(fuse(LLAMA.make(), half(LLAMA)), LLAMA))


def test_unloaded_it_is_the_original(tmp_path):
    there = get_peft_model(away("disk", tmp_path), half(LLAMA)).unload()
    assert torch.equal(logits(there, LLAMA), logits(LLAMA.make(), LLAMA))


def test_originals_that_are_dropped(tmp_path):
    there = get_peft_model(away("disk", tmp_path), half(LLAMA, base_weights="discard"))
    expected = get_peft_model(LLAMA.make(), half(LLAMA))
    assert torch.equal(logits(there, LLAMA), logits(expected, LLAMA))
    with pytest.raises(RuntimeError, match="were dropped"):
        there.unload()


def test_what_is_away_cannot_be_offloaded_again(tmp_path):
    with pytest.raises(ValueError, match="offloaded by accelerate already"):
        get_peft_model(away("disk", tmp_path), half(LLAMA, base_weights="offload"))
