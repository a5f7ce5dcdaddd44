"""Model types of transformers: fused, their outputs are reproduced, or they are refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from helpers import relative
from peft import get_peft_model
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peft_fusion import FusionConfig
from peft_fusion.ffn import find_all, find_ffns, read_all

# What the sizes are called in one config or another -> small ones.
SIZES = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("hidden_dim", "ffn_hidden_size"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "patch_size"), 8),
    **{"num_key_value_heads": 2, "num_kv_heads": 2, "rotary_dim": 4, "vocab_size": 99, "num_decoder_layers": 2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "image_size": 32, "num_mel_bins": 16},
    **{"word_embed_proj_dim": 32, "num_conv_pos_embeddings": 32, "num_conv_pos_embedding_groups": 2},
    **{"conv_dim": [32, 32], "conv_kernel": [3, 3], "conv_stride": [2, 2]},
}
TYPES = """
albert apertus arcee aria_text bart bert bert-generation big_bird biogpt bitnet blenderbot blenderbot-small bloom
camembert chinese_clip_vision_model clip_text_model clip_vision_model codegen cohere cohere2 convbert data2vec-audio
data2vec-text data2vec-vision deberta deberta-v2 deit dinov2 dinov2_with_registers dinov3_vit distilbert dpr dpt
electra ernie ernie4_5 esm exaone4 falcon flaubert fnet gemma gemma2 gemma3_text glm glm4 gpt-sw3 gpt2 gpt_bigcode
gpt_neox gpt_neox_japanese gptj granite helium hubert ijepa imagegpt layoutlm llama llama4_text longt5 m2m_100 marian
mbart megatron-bert ministral ministral3 mistral mobilebert modernbert modernbert-decoder mpnet mpt mt5 mvp nemotron
nllb-moe nomic_bert nystromformer olmo olmo2 olmo3 olmo_hybrid openai-gpt opt pegasus persimmon phi phi3 pixtral
plbart qwen2 qwen2_audio_encoder qwen3 qwen3_vl_text rembert roberta roberta-prelayernorm roformer sam_vision_model
seed_oss sew sew-d siglip_vision_model smollm3 splinter stablelm starcoder2 switch_transformers t5 umt5 unispeech
unispeech-sat vit vit_msn wav2vec2 wav2vec2-conformer wavlm whisper xglm xlm xlm-roberta xlm-roberta-xl yoso
"""
REFUSED = {"bitnet": r"of a BitNetMLP.*`ffn_sub_norm` \(BitNetRMSNorm\)"}


def tiny(model_type: str) -> nn.Module:
    """A model of a few thousand weights whose FFNs have each neuron twice."""
    config_class = CONFIG_MAPPING[model_type]
    known = vars(config_class())
    torch.manual_seed(0)
    model = tf.AutoModel.from_config(config_class(**{key: value for key, value in SIZES.items() if key in known}))
    for weights in (weights for ffn in find_all(model) for weights in read_all(ffn)):
        for block in weights.blocks():  # views of the model's own
            half = len(block) // 2
            block[half:] = block[:half]
    return model.eval()


def outputs(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (2, 7), generator=generator)
    shapes = {"pixel_values": (2, 3, 32, 32), "input_values": (2, 400), "input_features": (2, 16, 128)}
    shape = shapes.get(model.main_input_name)
    batch = {model.main_input_name: ids if shape is None else torch.randn(shape, generator=generator)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(**batch)[0]


@pytest.mark.parametrize("model_type", TYPES.split())
def test_outputs_are_reproduced_or_the_ffn_is_refused_by_name(model_type, unchanged):
    """At full width, and at half of it where every neuron is there twice."""
    model = tiny(model_type)
    assert find_ffns(model)
    if model_type in REFUSED:
        check = unchanged(model)
        with pytest.raises(ValueError, match=REFUSED[model_type]):
            get_peft_model(model, FusionConfig(ratio=1.0))
        check()
        return
    original = outputs(model)
    fused = get_peft_model(model, FusionConfig(ratio=1.0))
    assert relative(outputs(fused.get_base_model()), original) < 1e-6
    fused = get_peft_model(fused.unload(), FusionConfig(ratio=0.5))
    assert relative(outputs(fused.get_base_model()), original) < 1e-5


def test_every_refused_type_is_one_of_them():
    assert REFUSED.keys() <= set(TYPES.split())
