"""TRL's trainers: they make the adapter themselves, calibrated afterwards in place, and take `teacher` as a teacher."""

from __future__ import annotations

import pytest
import torch
from architectures import BY_NAME
from datasets import Dataset
from helpers import logits
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from peft_fusion import FusionConfig, calibrate, teacher
from peft_fusion.observe.unwrap import unwrapped

trl = pytest.importorskip("trl", reason="TRL is not installed")
gkd = pytest.importorskip("trl.experimental.gkd", reason="this TRL has no GKD")

LLAMA = BY_NAME["llama"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
COMMON = {"max_steps": 3, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True, "bf16": False}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(3, 96)} | {
        "<pad>": 0,
        "<s>": 1,
        "</s>": 2,
        "user": 96,
        "assistant": 97,
        "<u>": 98,
    }
    made = Tokenizer(WordLevel(words, unk_token="<u>"))
    made.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<u>"
    )
    fast.chat_template = TEMPLATE
    return fast


def words(seed: int, count: int) -> str:
    ids = torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{int(i)}" for i in ids)


def texts() -> Dataset:
    return Dataset.from_list([{"text": words(i, 12)} for i in range(24)])


def chats() -> Dataset:
    turns = [[("user", words(i, 4)), ("assistant", words(100 + i, 6))] for i in range(24)]
    return Dataset.from_list([{"messages": [{"role": r, "content": c} for r, c in turn]} for turn in turns])


def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": [{"role": "user", "content": words(i, 4)}]} for i in range(24)])


def moved(model, before) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def state(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_sft_makes_the_adapter_and_calibration_renews_it(tmp_path):
    config = trl.SFTConfig(output_dir=str(tmp_path), max_length=16, save_strategy="no", **COMMON)
    trainer = trl.SFTTrainer(
        LLAMA.make(),
        args=config,
        train_dataset=texts(),
        processing_class=tokenizer(),
        peft_config=FusionConfig(ratio=0.5),
    )
    before = state(trainer.model)
    calibrate(trainer.model, dataloader=trainer.get_train_dataloader())
    renewed = state(trainer.model)
    assert {name for name in renewed if "mlp_fusion_narrow" in name} >= moved(trainer.model, before) != set()
    trainer.train()
    trained = moved(trainer.model, renewed)
    assert trained and all("mlp_fusion_narrow" in name for name in trained)


def trainers(tmp_path, student):
    original = teacher(student)
    yield trl.DistillationTrainer(
        model=student,
        teacher_model=original,
        args=trl.DistillationConfig(output_dir=str(tmp_path), max_completion_length=4, save_strategy="no", **COMMON),
        train_dataset=prompts(),
        processing_class=tokenizer(),
    )
    yield gkd.GKDTrainer(
        model=student,
        teacher_model=original,
        args=gkd.GKDConfig(output_dir=str(tmp_path), lmbda=0.0, max_length=24, save_strategy="no", **COMMON),
        train_dataset=chats(),
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize("which", [0, 1], ids=["DistillationTrainer", "GKDTrainer"])
def test_a_teacher_that_shares_every_tensor(which, tmp_path):
    student = get_peft_model(LLAMA.make(), FusionConfig(ratio=0.5))
    before = state(student)
    *_, trainer = (made for made, _ in zip(trainers(tmp_path, student), range(which + 1), strict=False))
    trainer.train()
    changed = moved(student, before)
    assert changed and all("mlp_fusion_narrow" in name for name in changed)
    with student.disable_adapter():
        assert torch.equal(logits(unwrapped(student), LLAMA), logits(LLAMA.make(), LLAMA))
