"""Models of SmolLM2-135M's shape with random weights, for benchmarks of time and memory (not of quality)."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_fusion import FusionConfig
from peft_fusion.ffn import find_ffns

HIDDEN, WIDTH, LAYERS, VOCABULARY = 576, 1536, 30, 49152
SMOKE = {"layers": 2, "hidden": 96, "width": 256, "vocabulary": 512}


def llama(layers: int, hidden: int = HIDDEN, width: int = WIDTH, vocabulary: int = VOCABULARY) -> nn.Module:
    """A Llama of SmolLM2's proportions: heads of 64 (of 32 where that does not divide), a third of them for keys."""
    heads = max(3, hidden // 64)
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 3,
            tie_word_embeddings=True,
        )
    ).train()


def native(ratio: float, **sizes: int) -> nn.Module:
    """A model that was narrow from the start; only its FFNs train."""
    model = llama(**{**sizes, "width": round(ratio * sizes.get("width", WIDTH))})
    trained = {id(p) for ffn in find_ffns(model) for module in ffn.projections for p in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return model


def fused(ratio: float, base_weights: str = "keep", **sizes: int) -> nn.Module:
    """A full-width model with narrow FFNs in place; random ones, for clustering is not what is measured."""
    return get_peft_model(llama(**sizes), FusionConfig(ratio=ratio, init_weights=False, base_weights=base_weights))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def batch(size: int, length: int, vocabulary: int = VOCABULARY) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocabulary, (size, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, torch.Tensor]) -> None:
    model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
