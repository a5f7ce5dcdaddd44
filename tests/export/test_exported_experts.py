"""Exported experts: one width for all of a model's layers is a stock checkpoint."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from peft import get_peft_model

from peft_fusion import FusionConfig, export

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, intermediate_size=32, num_local_experts=4)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**SIZES, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=8)
    ),
}


@pytest.mark.parametrize("name", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_stock_transformers_loads_them(name, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(MODELS[name]().eval(), FusionConfig(ratio=0.5))
    done = export(model, tmp_path / "small")
    assert not done.needs_code and done.difference < 1e-5
    assert done.widths and all(widths == (32, 16) for widths in done.widths.values())
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert sum(p.numel() for p in loaded.parameters()) == done.parameters[1] < done.parameters[0]
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_experts_of_some_layers_alone(tmp_path):
    torch.manual_seed(0)
    config = FusionConfig(ratio=0.5, layers_to_transform=[1])
    model = get_peft_model(MODELS["mixtral"]().eval(), config)
    done = export(model, tmp_path / "small")
    assert done.needs_code and done.difference < 1e-5
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
