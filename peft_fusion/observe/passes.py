"""Sequences that go through a model together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..ffn import like_of, networks_of
from .batches import MOST_LENGTH, Batch
from .networks import Network

MOST_AT_ONCE, ACTIVATIONS_SHARE = 8, 1 / 16
"""Sequences that go through a model together at most, and the share of the bytes of its weights that they may take."""


def sequences_at_once(network: Network) -> int:
    """How many sequences go through a model together: small products leave a machine waiting for its memory.

    Args:
        network: the model, also on the meta device, and its FFNs, at least one.

    Returns:
        From 1 to `MOST_AT_ONCE`: as many as take `ACTIVATIONS_SHARE` of what the weights take.
    """
    weights = sum(parameter.nbytes for parameter in network.model.parameters())
    config: Any = getattr(network.model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    vocabulary = getattr(config, "vocab_size", None) or 0
    ones = (one for ffn in network.ffns for one in networks_of(ffn))
    layer = max(like_of(one).element_size() * (4 * one.width + 8 * one.in_dim) for one in ones)
    return max(1, min(MOST_AT_ONCE, int(ACTIVATIONS_SHARE * weights / (MOST_LENGTH * (layer + 8 * vocabulary)))))


def passes_of(sequences: Sequence[Batch], at_once: int) -> list[Batch]:
    """Batches of one sequence joined to larger ones, in their order; only neighbours of the same shape are.

    Args:
        sequences: batches of one sequence each.
        at_once: how many of them to join at most.

    Returns:
        Batches of 1 to `at_once` sequences. What is no tensor with a first dimension of 1 and another keeps its
        sequence by itself.
    """
    passes: list[Batch] = []
    for shape, alike in groupby(sequences, key=_shape):
        found, size = list(alike), at_once if shape else 1
        parts = (found[start : start + size] for start in range(0, len(found), size))
        passes += [part[0] if len(part) == 1 else _joined(part) for part in parts]
    return passes


def _shape(sequence: Batch) -> list[tuple[str, torch.Size, torch.dtype]]:
    """What sequences have to share to be joined; nothing if one cannot be."""
    tensors = {name: value for name, value in sequence.items() if isinstance(value, Tensor)}
    if len(tensors) < len(sequence) or any(value.dim() < 2 or len(value) != 1 for value in tensors.values()):
        return []
    return sorted((name, value.shape, value.dtype) for name, value in tensors.items())


def _joined(sequences: Sequence[Batch]) -> Batch:
    return {name: torch.cat([sequence[name] for sequence in sequences]) for name in sequences[0]}
