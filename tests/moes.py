"""One tiny mixture of experts for every way in which experts are stored or run: random weights, two experts a token."""

from __future__ import annotations

from architectures import DECODER, Architecture

SMALL = {**DECODER, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "head_dim": 8}


def _config(name: str, **changes):
    import transformers as tf

    return lambda: getattr(tf, name)(**{**SMALL, **changes})


MIXTRAL = Architecture("mixtral", "MixtralForCausalLM", _config("MixtralConfig", num_local_experts=4), ffns=2)
QWEN2 = Architecture(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    _config(
        "Qwen2MoeConfig",
        num_experts=4,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=80,
        mlp_only_layers=[0],
    ),
    width=48,
    ffns=3,
    attribute="moe_intermediate_size",
)
DEEPSEEK = Architecture(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    _config(
        "DeepseekV3Config",
        num_key_value_heads=4,
        n_routed_experts=4,
        moe_intermediate_size=48,
        n_shared_experts=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    width=48,
    ffns=3,
    attribute="moe_intermediate_size",
)
GPT_OSS = Architecture(
    "gpt_oss",
    "GptOssForCausalLM",
    _config("GptOssConfig", num_local_experts=4, layer_types=["full_attention", "full_attention"]),
    ffns=2,
)
NEMOTRON_H = Architecture(
    "nemotron_h",
    "NemotronHForCausalLM",
    _config(
        "NemotronHConfig",
        layers_block_type=["moe", "attention"],
        n_routed_experts=4,
        n_groups=1,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=80,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
    ),
    width=48,
    ffns=2,
    attribute="moe_intermediate_size",
)
LLAMA4 = Architecture(
    "llama4",
    "Llama4ForCausalLM",
    _config(
        "Llama4TextConfig",
        num_local_experts=4,
        num_experts_per_tok=1,
        intermediate_size_mlp=96,
        interleave_moe_layer_step=2,
    ),
    ffns=3,
)

MOES = [MIXTRAL, QWEN2, DEEPSEEK, GPT_OSS, NEMOTRON_H, LLAMA4]
