"""Batches: sequences one by one, their first tokens, and which of their positions are padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Any]

MOST_LENGTH = 64
"""Tokens that count of a sequence where gradients are taken, the first ones: a backward pass holds a whole graph."""


def single_sequences(batch: Batch, first: int = 0, step: int = 1) -> Iterator[Batch]:
    """Every `step`-th of a batch's sequences as a batch of its own; copies, so that the others need not be kept."""
    size = next(len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim())
    for i in range(first, size, step):
        yield {
            k: v[i : i + 1].clone() if isinstance(v, Tensor) and v.dim() and len(v) == size else v
            for k, v in batch.items()
        }


def shortened(sequence: Batch) -> Batch:
    """A batch of one text, cut to its first tokens that are not padding; other inputs stay as they are."""
    ids, mask = sequence.get("input_ids"), sequence.get("attention_mask")
    if ids is None or ids.dim() != 2:
        return sequence
    start = int(mask[0].argmax()) if mask is not None and mask.shape == ids.shape else 0
    window = slice(start, start + MOST_LENGTH)
    return {k: v[:, window] if isinstance(v, Tensor) and v.shape == ids.shape else v for k, v in sequence.items()}


def padding_mask(batch: Batch, shape: torch.Size, decoder: bool) -> Tensor | None:
    """Which positions of a (batch, length, ...) or (batch * length, dim) tensor hold tokens, not padding.

    Args:
        batch: the model's inputs.
        shape: the tensor's.
        decoder: whether it belongs to the decoder of an encoder-decoder, whose tokens have a mask of their own.

    Returns:
        Boolean tensor of the tensor's shape without its last dimension, or None if every position counts.
    """
    labels, mask = batch.get("labels"), batch.get("decoder_attention_mask" if decoder else "attention_mask")
    if decoder and mask is None and isinstance(labels, Tensor):
        mask = labels != -100
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    if shape[:-1] == mask.shape:
        return mask.bool()
    return mask.bool().flatten() if shape[:-1] == mask.flatten().shape else None
