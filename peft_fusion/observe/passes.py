"""Sequences that go through a model together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from .batches import Batch


def passes_of(sequences: Sequence[Batch], at_once: int) -> list[Batch]:
    """Batches of one sequence joined to larger ones, in their order; only neighbours of the same shape are.

    Args:
        sequences: batches of one sequence each.
        at_once: how many of them to join at most.
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
