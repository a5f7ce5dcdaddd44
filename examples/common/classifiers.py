"""Classifiers: their inputs, accuracy, logits, and the plain model that is left of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from .reporting import folder_size
from .text_tasks import Example

MAX_TOKENS = 64


def tokenize(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example], length: int = MAX_TOKENS
) -> list[dict[str, Any]]:
    """Examples as token ids, at most `length`, and label."""
    return [
        {**tokenizer(text, pair, truncation=True, max_length=length), "labels": label} for text, pair, label in examples
    ]


def accuracy(trainer: Trainer, test: list[dict[str, Any]]) -> float:
    by_length = sorted(test, key=lambda example: len(example["input_ids"]))  # less padding
    output = trainer.predict(by_length)
    return float((output.predictions.argmax(-1) == output.label_ids).mean())


@torch.no_grad()
def logits(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, inputs: Sequence[Sequence[str | None]]
) -> torch.Tensor:
    """A classifier's logits of (text, None or second text) inputs, of shape (inputs, labels), on the CPU."""
    model.cpu().eval()
    rows = [model(**tokenizer(text, pair, truncation=True, return_tensors="pt")).logits for text, pair in inputs]
    return torch.cat(rows)


def save_merged(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: str) -> dict[str, Any]:
    """Saves what remains when the adapter is merged: a plain model, and the parameters it costs to run."""
    plain = model.merge_and_unload() if isinstance(model, PeftModel) else model
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"parameters": sum(p.numel() for p in plain.parameters()), "merged_mb": folder_size(folder)}
