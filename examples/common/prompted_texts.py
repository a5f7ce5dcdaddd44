"""Texts that a causal language model learns to give after a prompt: tokens, generation, perplexity, BLEU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from .errors import InputError

PROMPT = "{data}\nText:"
IGNORED = -100  # no loss where a label is this

# `input_ids`, `attention_mask` and `labels` of one text after its data
TokenisedText = dict[str, list[int]]


def padded(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """What makes a batch of tokenised texts; neither padding nor data is learnt."""
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)


def tokenise(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]], longest: int) -> list[TokenisedText]:
    """Pairs as tokens; those of more than `longest` are left out, since a cut text would teach to stop early.

    Raises:
        InputError: all of them are too long.
    """
    kept = [text for data, reference in pairs if len((text := encode(tokenizer, data, reference))["labels"]) <= longest]
    if not kept:
        raise InputError(f"all {len(pairs)} examples have more than --max-tokens {longest} tokens")
    return kept


def encode(tokenizer: PreTrainedTokenizerBase, data: str, text: str) -> TokenisedText:
    """Prompt, text and end as tokens; labels only from the text on.

    Prompt and text are tokenised apart, so that no token spans both and the prompt is the one of `generate`.
    """
    prompt = tokenizer(PROMPT.format(data=data))["input_ids"]
    target = tokenizer(f" {text}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    tokens = prompt + target
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": [IGNORED] * len(prompt) + target}


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    beams: int = 1,
) -> list[str]:
    """The first line that the model says to each of the data, by beams or, with one, greedily."""
    outputs = [""] * len(inputs)
    order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))  # less padding
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        prompts = [PROMPT.format(data=inputs[i]) for i in chosen]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        tokens = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            num_beams=beams,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            outputs[i] = next(iter(text.strip().splitlines()), "").strip()
    return outputs


@torch.no_grad()
def text_perplexity(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[TokenisedText], batch_size: int
) -> float:
    """exp of the mean loss over the tokens of all texts, the end of each included, the data left out."""
    by_length = sorted(texts, key=lambda text: len(text["input_ids"]))
    device, total, tokens = next(model.parameters()).device, 0.0, 0
    for batch in DataLoader(by_length, batch_size, collate_fn=padded(tokenizer)):  # type: ignore[arg-type]
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += float(model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss) * count
        tokens += count
    return math.exp(total / tokens)


def bleu(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """sacrebleu's corpus BLEU, from 0 to 100; outputs may have different numbers of references."""
    most = max(map(len, references))
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    return bleu_library().corpus_bleu(list(outputs), streams).score


def bleu_library() -> ModuleType:
    try:
        import sacrebleu
    except ImportError as error:
        raise InputError("BLEU needs the `sacrebleu` library: pip install sacrebleu") from error
    return sacrebleu
