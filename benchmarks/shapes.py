"""Models of SmolLM2-135M's shape with random weights, for benchmarks of time and memory (not of quality)."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_fusion import FusionConfig
from peft_fusion.ffn import find_ffns
from peft_fusion.tuner.narrow import NarrowInProjection

HIDDEN, WIDTH, LAYERS, VOCABULARY = 576, 1536, 30, 49152
PRECISIONS = ("fp32", "bf16")
"""bf16 as `TrainingArguments(bf16=True)` has it: weights in fp32, the forward pass under autocast to bf16."""

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
    """A full-width model with narrow FFNs in place that have every scale that a calibrated one has.

    Weights and scales are made up, for neither clustering nor calibrating is what is measured.
    """
    config = FusionConfig(ratio=ratio, init_weights=False, scale="counts", base_weights=base_weights)
    model = get_peft_model(llama(**sizes), config)
    for module in model.modules():
        if isinstance(module, NarrowInProjection):  # the out-projections have theirs
            module.scale = torch.ones(len(module.weight))
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def batch(size: int, length: int, vocabulary: int = VOCABULARY) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocabulary, (size, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, torch.Tensor], precision: str
) -> None:
    """One step in one of `PRECISIONS`."""
    with torch.autocast(inputs["input_ids"].device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
