"""Running text for causal language models: papers, files or the Hub's, cut into blocks; perplexity on them."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, default_data_collator

from . import hub_datasets as hub
from . import scientific_papers as papers

AT_ONCE = 2  # blocks of a batch, where only the loss is asked for

# `input_ids` and `labels` of one block of running text
Block = dict[str, list[int]]


def load_texts(name: str = "papers") -> tuple[list[str], list[str]]:
    """Running text as (training documents, held-out documents).

    Args:
        name: "papers", a text file (its last tenth is held out), or a Hub id or local path for `datasets`.

    Raises:
        InputError: no such data set, its files are missing, or its text column cannot be told.
    """
    if name == "papers":
        return papers.paper_texts("train"), papers.paper_texts("test")
    path = Path(name)
    if path.suffix in (".txt", ".md") and path.is_file():
        text = path.read_text(encoding="utf-8")
        cut = len(text) * 9 // 10
        return [text[:cut]], [text[cut:]]
    train, test = hub.train_and_test(name, hub.load(name))
    column = hub.text_columns(name, train.features)[0]
    return list(train[column]), list(test[column])


def blocks(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> list[Block]:
    """The texts' tokens, an end-of-text token between them, cut into blocks of `length`; the rest is dropped."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = list(chain.from_iterable(ids + end for ids in tokenizer(texts)["input_ids"]))
    pieces = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


@torch.no_grad()
def perplexity(model: torch.nn.Module, held_out: list[Block]) -> float:
    """exp of the mean loss per token, which is the mean over blocks, as all blocks have the same length."""
    model.eval()
    device = next(model.parameters()).device
    losses = []
    for start in range(0, len(held_out), AT_ONCE):
        batch = default_data_collator(held_out[start : start + AT_ONCE])
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        losses += [float(loss)] * len(batch["input_ids"])
    return math.exp(sum(losses) / len(losses))
