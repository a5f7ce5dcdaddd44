"""One tiny model a layout: random weights, made in milliseconds, for tests of plumbing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
POSITIONS = {"max_position_embeddings": 64}
DECODER = {
    **TEXT,
    **POSITIONS,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


ALIKE = ("llama_bias", "mistral", "qwen2", "qwen3", "gpt_neox", "roberta")
"""Architectures whose FFNs are laid out as another's: tests of them are marked `slow` (see conftest.py)."""

COMMON = ("bert", "gpt2", "llama", "t5_gated")
"""One of each kind: tests that are marked `common` are `slow` on all others."""


@dataclass(frozen=True)
class Architecture:
    """A tiny model of one architecture.

    Args:
        name: for the test's id.
        model_class: name of the class in transformers.
        config: makes its configuration.
        width: the FFNs' full width.
        ffns: how many FFNs it has.
        attribute: the config's attribute that states the width.
        classifies: whether its labels have the shape (batch,) instead of (batch, length).
        task_type: PEFT's name for what it does.
    """

    name: str
    model_class: str
    config: Callable[[], Any]
    width: int = 64
    ffns: int = 3
    attribute: str = "intermediate_size"
    classifies: bool = False
    task_type: str = "CAUSAL_LM"

    def make(self, seed: int = 0, **changes: Any) -> nn.Module:
        """A fresh model in eval mode; the same seed gives the same weights, and the same random numbers after it."""
        model = self.built(seed, **changes) if changes else copy.deepcopy(_built(self, seed))
        torch.manual_seed(seed)
        return model

    def built(self, seed: int, **changes: Any) -> nn.Module:
        """One that is really built, which takes several times as long as copying one."""
        torch.manual_seed(seed)
        config = self.config()
        for key, value in changes.items():
            setattr(config, key, value)
        model = getattr(tf, self.model_class)(config)
        with torch.no_grad():  # biases start at zero, which would hide mistakes with them
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model.eval()

    def batch(self, labels: bool = False, seed: int = 1, size: int = 3) -> dict[str, Tensor]:
        """Inputs of `size` sequences, with labels on request."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 99, (size, 7), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.model_class.startswith("T5"):
            batch["decoder_input_ids"] = ids.flip(1)
        if labels:
            batch["labels"] = ids[:, 0] % 3 if self.classifies else ids
            if "decoder_input_ids" in batch:
                del batch["decoder_input_ids"]
        return batch


@lru_cache
def _built(architecture: Architecture, seed: int) -> nn.Module:
    return architecture.built(seed)


def _t5(**kwargs: Any) -> Any:
    return tf.T5Config(
        vocab_size=99,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        **kwargs,
    )


ARCHITECTURES = [
    Architecture(
        "bert",
        "BertForSequenceClassification",
        lambda: tf.BertConfig(**TEXT, **POSITIONS, intermediate_size=64, num_labels=3),
        classifies=True,
        task_type="SEQ_CLS",
    ),
    Architecture(
        "roberta",
        "RobertaForSequenceClassification",
        lambda: tf.RobertaConfig(**TEXT, **POSITIONS, intermediate_size=64, num_labels=3, pad_token_id=0),
        classifies=True,
        task_type="SEQ_CLS",
    ),
    Architecture(
        "modernbert",
        "ModernBertForSequenceClassification",
        lambda: tf.ModernBertConfig(**DECODER, num_labels=3, cls_token_id=1, sep_token_id=2),
        classifies=True,
        task_type="SEQ_CLS",
    ),
    Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        lambda: tf.GPT2Config(
            vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        ),
        width=128,
        attribute="n_inner",
    ),
    Architecture(
        "opt",
        "OPTForCausalLM",
        lambda: tf.OPTConfig(
            **TEXT,
            **POSITIONS,
            ffn_dim=64,
            word_embed_proj_dim=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        attribute="ffn_dim",
    ),
    Architecture("gpt_neox", "GPTNeoXForCausalLM", lambda: tf.GPTNeoXConfig(**DECODER)),
    Architecture(
        "t5",
        "T5ForConditionalGeneration",
        lambda: _t5(feed_forward_proj="relu"),
        ffns=4,
        attribute="d_ff",
        task_type="SEQ_2_SEQ_LM",
    ),
    Architecture(
        "t5_gated",
        "T5ForConditionalGeneration",
        lambda: _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        ffns=4,
        attribute="d_ff",
        task_type="SEQ_2_SEQ_LM",
    ),
    Architecture("llama", "LlamaForCausalLM", lambda: tf.LlamaConfig(**DECODER, num_key_value_heads=2)),
    Architecture("llama_bias", "LlamaForCausalLM", lambda: tf.LlamaConfig(**DECODER, mlp_bias=True)),
    Architecture("mistral", "MistralForCausalLM", lambda: tf.MistralConfig(**DECODER, num_key_value_heads=2)),
    Architecture("qwen2", "Qwen2ForCausalLM", lambda: tf.Qwen2Config(**DECODER, num_key_value_heads=2)),
    Architecture("qwen3", "Qwen3ForCausalLM", lambda: tf.Qwen3Config(**DECODER, num_key_value_heads=2, head_dim=8)),
    Architecture("phi3", "Phi3ForCausalLM", lambda: tf.Phi3Config(**DECODER, num_key_value_heads=2)),
]
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
