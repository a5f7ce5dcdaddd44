"""Batches: what they have to be, their sequences one by one, and which of their positions are padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Any]

MOST_LENGTH = 64
"""Tokens that count of a sequence where gradients are taken, the first ones: a backward pass holds a whole graph."""


def check_batch(batch: object) -> None:
    """Refuses what is not a batch as `Trainer` gives it to a model.

    Raises:
        ValueError: if it is not a mapping with a tensor whose first dimension counts sequences.
    """
    if isinstance(batch, Mapping) and any(_counts(value) for value in batch.values()):
        return
    found = {k: _described(v) for k, v in batch.items()} if isinstance(batch, Mapping) else _described(batch)
    raise ValueError(
        "A batch must be a mapping of argument names to tensors, as `Trainer`'s collator makes it, with a first "
        f"dimension that counts the sequences, but got {found}."
    )


def batch_size(batch: Batch) -> int:
    """How many sequences a batch has, by its first tensor that has dimensions."""
    return next(len(value) for value in batch.values() if _counts(value))


def take(dataloader: Iterable[Batch], sequences: int) -> list[Batch]:
    """The first so many sequences of a data loader, batch by batch; the last batch is cut.

    Raises:
        ValueError: if it yields what is no batch.
    """
    taken: list[Batch] = []
    left = sequences
    for batch in dataloader:
        check_batch(batch)
        size = batch_size(batch)
        taken.append(batch if size <= left else _part(batch, slice(0, left)))
        left -= min(size, left)
        if not left:
            break
    return taken


def single_sequences(batch: Batch, first: int = 0, step: int = 1) -> Iterator[Batch]:
    """Every `step`-th of a batch's sequences as a batch of its own."""
    for i in range(first, batch_size(batch), step):
        yield _part(batch, slice(i, i + 1))


def unlabelled(batch: Batch, is_encoder_decoder: bool) -> Batch:
    """A batch without labels, unless an encoder-decoder makes its decoder's inputs from them."""
    keep = is_encoder_decoder and "decoder_input_ids" not in batch
    return batch if keep else {key: value for key, value in batch.items() if key != "labels"}


def shortened(sequence: Batch) -> Batch:
    """A batch of one text, cut to its first tokens that are not padding; other inputs stay as they are.

    Where it is several texts packed into one, what tells Flash attention where each ends is cut with it.
    """
    ids, mask = sequence.get("input_ids"), sequence.get("attention_mask")
    if ids is None or ids.dim() != 2:
        return sequence
    start = int(mask[0].argmax()) if mask is not None and mask.shape == ids.shape else 0
    window = slice(start, start + MOST_LENGTH)
    return {key: _cut(key, value, window, ids.shape) for key, value in sequence.items()}


def _cut(name: str, value: Any, window: slice, shape: torch.Size) -> Any:
    if isinstance(value, Tensor) and value.shape == shape:
        return value[:, window]
    return value.clamp(max=window.stop) if name.startswith("cu_seq_lens") else value


def token_mask(batch: Batch, decoder: bool) -> Tensor | None:
    """Which positions of a batch hold tokens, not padding: boolean (batch, length), or None if nothing says so.

    Args:
        batch: the model's inputs.
        decoder: whether of the decoder of an encoder-decoder, whose tokens have a mask of their own.
    """
    labels, mask = batch.get("labels"), batch.get("decoder_attention_mask" if decoder else "attention_mask")
    if decoder and mask is None and isinstance(labels, Tensor):
        mask = labels != -100
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def padding_mask(batch: Batch, shape: torch.Size, decoder: bool) -> Tensor | None:
    """Which positions of a (batch, length, ...) or (batch * length, dim) tensor hold tokens, not padding.

    Args:
        batch: the model's inputs.
        shape: the tensor's.
        decoder: whether it belongs to the decoder of an encoder-decoder.

    Returns:
        Boolean tensor of the tensor's shape without its last dimension, or None if every position counts.
    """
    mask = token_mask(batch, decoder)
    if mask is None or shape[:-1] == mask.shape:
        return mask
    return mask.flatten() if shape[:-1] == mask.flatten().shape else None


class Positions:
    """Where in its batch every token is that goes through an FFN, call by call of one forward pass.

    An FFN may get a whole batch at once, its tokens in one row, or (`chunk_size_feed_forward`) some positions of
    all sequences at a time; a shared FFN (ALBERT) gets all of that several times.

    Args:
        batch: the model's inputs.
        is_encoder_decoder: whether the model is one.
    """

    def __init__(self, batch: Batch, is_encoder_decoder: bool) -> None:
        sides = (False, True) if is_encoder_decoder else (False,)
        self._masks = {decoder: None if (m := token_mask(batch, decoder)) is None else m.cpu() for decoder in sides}
        self._is_encoder_decoder, self._size = is_encoder_decoder, batch_size(batch)
        self._next: dict[str, int] = {}

    def of(self, name: str, activations: Tensor) -> tuple[Tensor, Tensor]:
        """Places the tokens of the next call of an FFN.

        Args:
            name: the FFN's name; a part "decoder" tells that it is in one.
            activations: what goes through it, (..., dim).

        Returns:
            For each token, in the order of `activations.reshape(-1, dim)`: whether it is one and not padding, and the
            number of its sequence in the batch. In CPU memory: how many there are is known without waiting.
        """
        count = activations.shape[:-1].numel()
        sequence = torch.arange(count) * self._size // max(count, 1)
        mask = self._masks[self._is_encoder_decoder and in_decoder(name)]
        valid = None if mask is None else self._columns(name, mask, activations)
        return torch.ones_like(sequence, dtype=torch.bool) if valid is None else valid.reshape(-1), sequence

    def _columns(self, name: str, mask: Tensor, activations: Tensor) -> Tensor | None:
        """The part of a mask that belongs to this call; None if the shapes do not tell."""
        if activations.shape[:-1].numel() == mask.numel():
            return mask
        if activations.dim() != 3 or len(activations) != len(mask) or mask.shape[1] % activations.shape[1]:
            return None
        start = self._next.get(name, 0)
        stop = start + activations.shape[1]
        self._next[name] = stop % mask.shape[1]
        return mask[:, start:stop]


def in_decoder(name: str) -> bool:
    """Whether a module of an encoder-decoder is a part of its decoder."""
    return "decoder" in name.split(".")


def _part(batch: Batch, rows: slice) -> Batch:
    """Some of a batch's sequences; copies, so that the others need not be kept."""
    size = batch_size(batch)
    return {k: v[rows].clone() if _counts(v) and len(v) == size else v for k, v in batch.items()}


def _counts(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _described(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
