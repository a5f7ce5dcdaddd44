"""Adapters that version 0.1.0 saved load to the outputs that they had there, bit for bit.

Where not even the base model's outputs are the same to the bit, this machine rounds otherwise than the one that saved
them; then they may differ by twice as much as those do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

SAVED = Path(__file__).parents[1] / "fixtures" / "adapters_0_1"
OUTPUTS = load_file(SAVED / "outputs.safetensors")
ADAPTERS = sorted(name for name in OUTPUTS if "/" in name and not name.endswith("/base"))


def base(name: str) -> Any:
    folder = SAVED / name / "base"
    config = tf.AutoConfig.from_pretrained(folder)
    return getattr(tf, config.architectures[0]).from_pretrained(folder)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = OUTPUTS["input_ids"]
    decoder = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **decoder).logits


def check(model: Any, adapter: str) -> None:
    name = adapter.split("/")[0]
    rounding = float((logits(base(name)) - OUTPUTS[f"{name}/base"]).abs().max())
    assert rounding < 1e-5
    torch.testing.assert_close(logits(model), OUTPUTS[adapter], rtol=0.0, atol=2 * rounding)


def test_no_kind_is_missing():
    models, kinds = (
        ("bert", "llama", "llama_bias", "t5_gated"),
        ("calibrated", "low_rank", "two_widths", "uncalibrated"),
    )
    expected = [f"{model}/{kind}" for model in models for kind in kinds]
    assert sorted([*expected, "bert/trained_classifier", "llama/bin"]) == ADAPTERS


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_loads_to_the_same_outputs(adapter: str):
    check(PeftModel.from_pretrained(base(adapter.split("/")[0]), SAVED / adapter), adapter)


@pytest.mark.parametrize("adapter", ["llama/calibrated", "llama/low_rank"])
def test_transformers_loads_it_to_the_same_outputs(adapter: str):
    model = base("llama")
    model.load_adapter(str(SAVED / adapter))
    check(model, adapter)


def test_the_adapters_of_a_model_differ():
    kinds = [OUTPUTS[f"llama/{kind}"] for kind in ("base", "calibrated", "low_rank", "two_widths", "uncalibrated")]
    assert all((a - b).norm() > 1e-3 * b.norm() for i, a in enumerate(kinds) for b in kinds[:i])
