"""transformers' Trainer around a fused model: resuming, the best checkpoint, accumulation, bf16, LoRA beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_NAME, Architecture
from helpers import half, logits
from peft import PeftModel, get_peft_model
from test_mixed import injected
from transformers import Trainer, TrainingArguments

from peft_fusion import calibrate

both = pytest.mark.parametrize("name", ["llama", "bert"])


def rows(architecture: Architecture, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    batch = architecture.batch(labels=True, seed=seed, size=count)
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


def trainer(model: torch.nn.Module, architecture: Architecture, folder: Path, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **{
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 2,
            "max_steps": 6,
            "save_steps": 3,
            "logging_steps": 100,
            **settings,
        },
    )
    return Trainer(
        model, arguments, train_dataset=rows(architecture, 8, seed=3), eval_dataset=rows(architecture, 4, seed=4)
    )


def trained_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def full_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and every buffer, the scales among them; one of ones is as good as none."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach().clone() for name, t in tensors if not (name.endswith(".scale") and bool((t == 1).all()))}


def check_same(resumed: torch.nn.Module, whole: torch.nn.Module, architecture: Architecture) -> None:
    expected, found = full_state(whole), full_state(resumed)
    assert found.keys() == expected.keys()
    assert [key for key, tensor in found.items() if not torch.equal(tensor, expected[key])] == []
    assert torch.equal(logits(resumed, architecture), logits(whole, architecture))


def script(architecture: Architecture, calibrated: bool, **settings: Any) -> torch.nn.Module:
    """What a training script makes before it trains."""
    model, config = architecture.make(), half(architecture, **settings)
    if calibrated:
        calibrate(model, config, [architecture.batch(seed=seed, size=4) for seed in range(3)])
    return get_peft_model(model, config)


@both
@pytest.mark.parametrize("base_weights", ["keep", "offload", "discard"])
def test_resumed_run_equals_an_uninterrupted_one(name, base_weights, tmp_path):
    architecture = BY_NAME[name]
    whole, resumed = (script(architecture, False, base_weights=base_weights) for _ in range(2))
    start = trained_state(resumed)
    trainer(whole, architecture, tmp_path).train()
    trainer(resumed, architecture, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(not torch.equal(tensor, start[key]) for key, tensor in trained_state(resumed).items())
    check_same(resumed, whole, architecture)


@both
@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_the_checkpoint_decides_whichever_script_calibrates(name, first, second, tmp_path):
    architecture = BY_NAME[name]
    whole, resumed = script(architecture, first), script(architecture, second)
    assert (full_state(whole).keys() == full_state(resumed).keys()) == (first == second)  # a scale on both sides
    trainer(whole, architecture, tmp_path).train()
    trainer(resumed, architecture, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    check_same(resumed, whole, architecture)
    resumed.save_pretrained(tmp_path / "saved")
    check_same(PeftModel.from_pretrained(architecture.make(), tmp_path / "saved"), whole, architecture)


def test_lora_beside_fusion_resumes_too(tmp_path):
    llama = BY_NAME["llama"]
    whole, resumed = injected(llama), injected(llama)
    assert all(any(kind in key for key in trained_state(whole)) for kind in ("lora_", "mlp_fusion_"))
    trainer(whole, llama, tmp_path).train()
    trainer(resumed, llama, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    check_same(resumed, whole, llama)


@both
def test_best_model_is_loaded_at_the_end(name, tmp_path):
    architecture = BY_NAME[name]
    model = get_peft_model(architecture.make(), half(architecture))
    run = trainer(
        model,
        architecture,
        tmp_path,
        learning_rate=1.0,  # so high that the first checkpoint is the best
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    checkpoints = {p: PeftModel.from_pretrained(architecture.make(), p) for p in tmp_path.glob("checkpoint-*")}
    assert len(checkpoints) == 2
    losses = {p: trainer(m, architecture, tmp_path / "eval").evaluate()["eval_loss"] for p, m in checkpoints.items()}
    assert best == min(losses, key=losses.get)
    for path, other in checkpoints.items():
        assert torch.equal(logits(other, architecture), logits(model, architecture)) == (path == best)


def test_accumulated_gradients_equal_a_larger_batch(tmp_path):
    """Not with BERT's head: Trainer does not average that loss over accumulated batches, whatever the method."""
    architecture = BY_NAME["llama"]
    models = [get_peft_model(architecture.make(), half(architecture)) for _ in range(2)]
    before = trained_state(models[0])
    settings = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1}  # Adam blows rounding up where gradients vanish
    trainer(models[0], architecture, tmp_path / "large", per_device_train_batch_size=4, **settings).train()
    trainer(models[1], architecture, tmp_path / "accumulated", gradient_accumulation_steps=2, **settings).train()
    expected = trained_state(models[0])
    for key, tensor in trained_state(models[1]).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-6)
        assert not torch.equal(tensor, before[key])


@both
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_bf16_autocast(name, gradient_checkpointing, tmp_path):
    architecture = BY_NAME[name]
    model = get_peft_model(architecture.make(), half(architecture))
    run = trainer(model, architecture, tmp_path, bf16=True, gradient_checkpointing=gradient_checkpointing)
    before = trained_state(model)
    result = run.train()
    assert result.training_loss == result.training_loss  # no NaN
    for key, tensor in trained_state(model).items():
        assert tensor.dtype == torch.float32 and torch.isfinite(tensor).all() and not torch.equal(tensor, before[key])
    loaded = PeftModel.from_pretrained(architecture.make(), tmp_path / "checkpoint-6", is_trainable=True)
    for key, tensor in trained_state(model).items():
        assert torch.equal(tensor, trained_state(loaded)[key])
