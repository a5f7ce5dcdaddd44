"""Hooks that take an FFN's inputs and hidden activations out of a forward pass, token by token, without padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..fusing.statistics import FFNStatistics
from ..observe.batches import single_sequences

HELD_OUT = 4
"""One sequence in so many is held out."""

Hook = Callable[[nn.Module, tuple[Any, ...]], None]


class UnusableActivations(ValueError):
    """Activations that no statistics can be made of; tells them from what the model itself raises."""


class Recorder:
    """Adds what goes through FFNs to their statistics, three sequences of four, and holds the fourth out.

    Args:
        statistics: FFN name -> what to add to.
        is_encoder_decoder: whether the model is an encoder-decoder, whose decoder has a mask of its own.
        sentences: how many sequences to keep as they are, in `sentences`.
        held_out: the same of held-out ones, in `held_out`.
    """

    def __init__(
        self, statistics: dict[str, FFNStatistics], is_encoder_decoder: bool, sentences: int = 0, held_out: int = 0
    ) -> None:
        self.statistics, self._decodes = statistics, is_encoder_decoder
        self.sentences: list[Mapping[str, Tensor]] = []
        self.held_out: list[Mapping[str, Tensor]] = []
        self._most_sentences, self._most_held_out = sentences, held_out
        self._masks: dict[str, Tensor | None] = {}
        self._size, self._first = 0, 0

    def start(self, batch: Mapping[str, Tensor], seen: int) -> int:
        """Notes the batch that goes through the model next.

        Args:
            batch: mapping of tensors whose first dimension counts the sequences.
            seen: sequences in the batches before it.

        Returns:
            The number of sequences in it.

        Raises:
            ValueError: if it is not a mapping of tensors.
        """
        if not isinstance(batch, Mapping) or not batch or not all(isinstance(v, Tensor) for v in batch.values()):
            what = (
                {k: type(v).__name__ for k, v in batch.items()} if isinstance(batch, Mapping) else type(batch).__name__
            )
            raise ValueError(
                f"A calibration batch must be a mapping of tensors, as `Trainer`'s collator makes it, but got {what}."
            )
        decoder = batch.get("decoder_attention_mask")
        if decoder is None and self._decodes and "labels" in batch:
            decoder = batch["labels"] != -100
        self._masks = {"encoder": batch.get("attention_mask"), "decoder": decoder}
        self._size, self._first = len(next(iter(batch.values()))), seen
        held_out = single_sequences(batch, (HELD_OUT - 1 - seen) % HELD_OUT, HELD_OUT)
        self.sentences += islice(single_sequences(batch), self._most_sentences - len(self.sentences))
        self.held_out += islice(held_out, self._most_held_out - len(self.held_out))
        return self._size

    def inputs_hook(self, name: str) -> Hook:
        """A hook before an FFN's in-projection: keeps the inputs of held-out tokens."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            tokens, _, held_out = self._tokens(args[0], name)
            self._guarded(name, lambda: self.statistics[name].hold_out(tokens[held_out]))

        return hook

    def hidden_hook(self, name: str) -> Hook:
        """A hook before an FFN's out-projection: adds the hidden activations of the other tokens."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            tokens, training, _ = self._tokens(args[0], name)
            self._guarded(name, lambda: self.statistics[name].add(tokens[training]))

        return hook

    def check(self, seen: int) -> None:
        """Refuses statistics of too few sequences.

        Raises:
            ValueError: if there is nothing to fit to, or nothing held out.
        """
        if seen < HELD_OUT:
            raise ValueError(
                f"Calibration needs at least {HELD_OUT} sequences, one of them to hold out, but got {seen}. 128 are "
                "a good number, or 512 of the model's own."
            )
        for name, statistics in self.statistics.items():
            if not statistics.tokens or not statistics.held_out_tokens:
                raise ValueError(
                    f"No token went through the FFN {name!r} ({statistics.tokens} to fit to, "
                    f"{statistics.held_out_tokens} held out): check `attention_mask`, or leave the FFN out."
                )

    def _guarded(self, name: str, record: Callable[[], None]) -> None:
        """Names the FFN whose activations cannot be used."""
        try:
            record()
        except ValueError as error:
            raise UnusableActivations(
                f"At the FFN {name!r} {error} (sequences {self._first} to {self._first + self._size - 1}). Check the "
                "model in this dtype, and the batch."
            ) from error

    def _tokens(self, activations: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Activations as (tokens, dim), and the tokens to fit to and to hold out, as boolean masks."""
        tokens = activations.detach().reshape(-1, activations.shape[-1])
        count, device = len(tokens), tokens.device
        valid = torch.ones(count, dtype=torch.bool, device=device)
        mask = self._masks["decoder" if self._decodes and "decoder" in name.split(".") else "encoder"]
        if mask is not None and mask.dim() == 2 and mask.numel() == count:
            valid = mask.reshape(-1).to(device).bool()
        sequence = self._first + torch.arange(count, device=device) * self._size // max(count, 1)
        held_out = sequence % HELD_OUT == HELD_OUT - 1
        return tokens, valid & ~held_out, valid & held_out
