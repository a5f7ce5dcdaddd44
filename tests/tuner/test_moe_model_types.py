"""Model types of transformers with routed experts: the whole life of an adapter, or a refusal that names them."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from ffn.test_model_types import SIZES
from helpers import relative
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peft_fusion import FusionConfig
from peft_fusion.ffn import find_experts

# What the sizes of experts, and of what goes with them, are called in one config or another -> small ones.
EXPERTS = {
    **{**SIZES, "num_key_value_heads": 4},
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "num_expert_group", "n_shared_experts"), 1),
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"first_k_dense_replace": 1, "num_dense_layers": 1, "num_nextn_predict_layers": 0},
}
TYPES = """
afmoe cohere2_moe deepseek_v2 deepseek_v3 dots1 flex_olmo glm4_moe gpt_oss granitemoe llama4_text minimax_m2
mixtral olmoe phimoe qwen2_moe qwen3_moe
"""
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def tiny(model_type: str) -> nn.Module:
    """A causal language model of some ten thousand weights, with two experts a token."""
    config_class = CONFIG_MAPPING[model_type]
    known = vars(config_class())
    torch.manual_seed(0)
    config = config_class(**{key: value for key, value in EXPERTS.items() if key in known})
    return tf.AutoModelForCausalLM.from_config(config).eval()


def outputs(model: nn.Module) -> Tensor:
    ids = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits


def train_a_step(model: nn.Module) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("model_type", TYPES.split())
def test_the_life_of_an_adapter(model_type, tmp_path):
    model = tiny(model_type)
    original = outputs(model)
    fused = get_peft_model(model, FusionConfig(ratio=1.0))
    assert find_experts(model) and relative(outputs(fused), original) < 1e-6
    fused = get_peft_model(fused.unload(), FusionConfig(ratio=0.5, task_type="CAUSAL_LM"))
    train_a_step(fused)
    trained = outputs(fused)
    fused.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(tiny(model_type), tmp_path / "adapter")
    assert torch.equal(outputs(reloaded), trained)
    for implementation in IMPLEMENTATIONS if model_type != "llama4_text" else ():  # which has one only
        reloaded.get_base_model().set_experts_implementation(implementation)
        assert relative(outputs(reloaded), trained) < 1e-5
    merged = fused.merge_and_unload()
    folded = outputs(merged)
    assert relative(folded, trained) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    stock = type(merged).from_pretrained(tmp_path / "merged")
    assert torch.equal(outputs(stock), folded)
