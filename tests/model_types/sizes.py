"""What sizes are called in the configs of transformers -> small ones; and what single model types need beside these."""

from __future__ import annotations

from typing import Any

import torch
from transformers import ResNetConfig

HIDDEN, VOCAB, IMAGE, PATCH = 32, 99, 32, 8


def _all(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, Any] = {
    **_all(
        HIDDEN,
        "hidden_size d_model n_embd dim emb_dim embedding_size word_embed_proj_dim embed_dim encoder_hidden_size "
        "decoder_hidden_size out_hidden_size output_dim projection_dim fusion_hidden_size encoder_hidden_dim",
    ),
    **_all(
        2,
        "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers depth "
        "decoder_num_hidden_layers encoder_num_hidden_layers num_encoder_layers",
    ),
    **_all(
        4,
        "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads attention_heads "
        "decoder_num_attention_heads encoder_num_attention_heads",
    ),
    **_all(4, "num_key_value_heads num_kv_heads decoder_num_key_value_heads encoder_num_key_value_heads"),
    # Widths of FFNs: unlike each other, and what else there is, so that none is taken for another.
    **_all(80, "intermediate_size n_inner d_ff ffn_dim encoder_ffn_dim hidden_dim ffn_hidden_size mlp_dim"),
    **_all(112, "decoder_ffn_dim intermediate_size_mlp decoder_intermediate_size dense_intermediate_size"),
    **_all(48, "moe_intermediate_size expert_ffn_hidden_size"),
    **_all(176, "shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size"),
    **_all(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_all(2, "num_experts_per_tok moe_topk moe_k num_experts_per_token moe_top_k top_k_experts"),
    **_all(1, "n_group topk_group n_groups num_expert_group mamba_n_groups first_k_dense_replace num_dense_layers"),
    **_all(2, "n_shared_experts moe_num_shared_experts num_shared_experts"),
    **_all(0, "num_nextn_predict_layers pad_token_id num_kv_shared_layers"),
    **{"use_cache": False, "initializer_range": 0.05},
    **_all(64, "max_position_embeddings n_positions max_source_positions max_target_positions max_seq_len"),
    **_all(8, "head_dim d_kv v_head_dim qk_rope_head_dim qk_nope_head_dim global_head_dim index_head_dim"),
    **_all(16, "kv_lora_rank q_lora_rank o_lora_rank num_mel_bins sliding_window qk_head_dim"),
    **_all(2, "index_n_heads index_topk"),
    **_all(VOCAB, "vocab_size vocab_size_per_layer_input entity_vocab_size src_vocab_size tgt_vocab_size"),
    **_all(8, "hidden_size_per_layer_input entity_emb_size"),
    **_all(IMAGE, "image_size"),
    **{"depths": 1, "hidden_sizes": HIDDEN, "num_queries": 4},
    **_all(PATCH, "patch_size"),
    **{"bos_token_id": 1, "eos_token_id": 2, "rotary_dim": 4, "decoder_start_token_id": 1},
    **{"num_conv_pos_embeddings": 32, "num_conv_pos_embedding_groups": 2},
    **{"conv_dim": [32, 32], "conv_kernel": [3, 3], "conv_stride": [2, 2], "num_feat_extract_layers": 2},
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_num_heads": 4, "mamba_head_dim": 16},
    **{"ssm_state_size": 8, "mamba_expand": 2, "state_size": 8, "time_step_rank": 4, "mamba_dt_rank": 4},
    **_all(2, "linear_num_key_heads linear_num_value_heads"),
    **_all(8, "linear_key_head_dim linear_value_head_dim linear_head_dim"),
    **{"linear_num_heads": 4, "num_position_embeddings": 16},
    **{"image_token_id": 90, "image_token_index": 90, "video_token_id": 91, "video_token_index": 91},
    **{"audio_token_id": 92, "audio_token_index": 92, "vision_start_token_id": 93, "vision_end_token_id": 94},
    **_all(95, "boi_token_id boi_token_index image_start_token_id video_start_token_id audio_start_token_id"),
    **_all(96, "eoi_token_id eoi_token_index image_end_token_id video_end_token_id audio_end_token_id eoa_token_index"),
}

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
THIRDS, HALF_OF_THEM = (
    {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}},
    {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}},
)
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 16, 16, 32], "depths": [1, 1, 1, 1]}

SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3], "num_time_features": 1}

OVERRIDES: dict[str, dict[str, Any]] = {
    **_all(THIRDS, "qwen2_vl_text qwen2_5_vl_text qwen2_5_omni_text qwen2_5_omni_talker paddleocr_vl_text"),
    **_all(THIRDS, "cosmos3_edge_text hunyuan_vl_text cohere_compass_text"),
    **_all(HALF_OF_THEM, "glm4v_text glm4v_moe_text glm_image_text glm_ocr_text"),
    **_all({"is_decoder": True}, "reformer"),
    **_all({**SERIES}, "autoformer informer time_series_transformer"),
    **_all({"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, "neomme"),
    **_all({"index_topk": 16}, "glm5_next_text"),
    **_all({"context_size": 16}, "granite_speech5_encoder"),
    **_all({"vocabulary_map": {"<image>": 90}}, "chameleon emu3"),
    **_all({"output_channels": HIDDEN}, "sam_vision_model sam_hq_vision_model"),
    **_all({"num_frames": 2}, "vivit timesformer videomae"),
    **_all(
        {"backbone_config": ResNetConfig(**RESNET, out_features=["stage4"]), "use_timm_backbone": False},
        "detr conditional_detr dab-detr table-transformer tvp",
    ),
    "deformable_detr": {
        "backbone_config": ResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"]),
        "use_timm_backbone": False,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "gemma3n_text": {"intermediate_size": 80, "activation_sparsity_pattern": [0.0, 0.0]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_vision_model": {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
    "mimo_v2_flash": {"head_dim": 24, "swa_head_dim": 24, "v_head_dim": 16, "swa_v_head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 64},
    "audio-spectrogram-transformer": {"max_length": 64},
    "lilt": {"hidden_size": 48},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "splinter": {"question_token_id": 3},
    "speech_to_text": {"input_feat_per_channel": 16},
    "siglip2_vision_model": {"num_patches": 16},
    "resnet": RESNET,
}

# What is given to a model: name -> shape of random numbers, or None for tokens (or what else its name means).
BOTH = {"input_ids": None, "pixel_values": None}
FRAMES = {"input_features": (2, 128, 16)}
VIDEO = {"pixel_values": (2, 2, 3, IMAGE, IMAGE)}
PAST = {"past_values": (2, 11), "past_time_features": (2, 11, 1), "past_observed_mask": (2, 11)}
FUTURE = {"future_values": (2, 4), "future_time_features": (2, 4, 1)}
PATCHES = {"pixel_values": (2, 16, 3 * PATCH**2), "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long)}
DECODED = {"decoder_input_ids": None}

INPUTS: dict[str, dict[str, Any]] = {
    **_all(BOTH, "aimv2 altclip blip chinese_clip clip clipseg groupvit siglip metaclip_2 owlvit owlv2 tipsv2 vilt"),
    **_all(BOTH, "vision-text-dual-encoder xclip grounding-dino mm-grounding-dino align flava"),
    **_all(FRAMES, "lasr_encoder lasr_ctc parakeet_encoder parakeet_ctc parakeet_rnnt parakeet_tdt"),
    **_all(FRAMES, "nemotron_asr_streaming nemotron_asr_streaming_encoder nemotron3_5_asr"),
    **_all({**FRAMES, **DECODED}, "canary cohere_asr speech_to_text"),
    **_all({"input_values": (2, 4000), **DECODED}, "moonshine moonshine_streaming"),
    **_all(VIDEO, "vivit timesformer videomae"),
    **_all({**PAST, **FUTURE}, "autoformer informer time_series_transformer"),
    "wav2vec2-bert": {"input_features": (2, 16, 160)},
    "audio-spectrogram-transformer": {"input_values": (2, 64, 16)},
    "bros": {"input_ids": None, "bbox": (2, 7, 4)},
    "udop": {"input_ids": None, "bbox": torch.linspace(0, 1, 56).view(2, 7, 4), **DECODED},
    "blip_2_qformer": {"query_embeds": (2, 7, HIDDEN)},
    "decision_transformer": {
        **{"states": (2, 7, 17), "actions": (2, 7, 4), "returns_to_go": (2, 7, 1), "timesteps": None},
        "attention_mask": torch.ones(2, 7),
    },
    "siglip2": {"input_ids": None, **PATCHES, "spatial_shapes": torch.full((2, 2), 4)},
    "siglip2_vision_model": {**PATCHES, "spatial_shapes": torch.full((2, 2), 4)},
    "splinter": {"input_ids": torch.tensor([[3, 5, 7, 9, 11, 13, 15], [17, 19, 3, 21, 23, 25, 27]])},
    "pix2struct": {"flattened_patches": (2, 16, 3 * PATCH**2 + 2), **DECODED},
    "patchtst": {"past_values": (2, 32, 1)},
    "patchtsmixer": {"past_values": (2, 32, 1)},
}

# Types of which no merged model is loaded as it was, for reasons that have nothing to do with widths.
NOT_RELOADED = {
    "shieldgemma2": "transformers does not load what it saves of such a model, whether it is fused or not",
    "t5gemma": "PEFT takes its tied embeddings for untied when it merges, whatever the method: set "
    "`config.tie_word_embeddings = True` before saving",
}

# Types whose outputs say nothing of small differences.
NOT_COMPARED = dict.fromkeys(
    ("grounding-dino", "mm-grounding-dino"), "its boxes magnify rounding in a tiny model, a hundred times and more"
)
