"""What a model sampled, kept in a file: sampling is what calibration and distillation without data wait for."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import ranks

NAMES = {"input_ids", "decoder_input_ids"}
PREFIX = "prefix"  # in the file's metadata: what all texts begin with


def check_file(file: str | Path) -> None:
    """Refuses a file that nothing could be written to.

    Raises:
        ValueError: if it is no `.safetensors` file, or its folder does not exist.
    """
    path = Path(file)
    if path.suffix != ".safetensors" or not path.parent.is_dir():
        raise ValueError(f"Own text is kept in a `.safetensors` file of a folder that exists, but got {str(file)!r}.")


def read_text(
    file: str | Path, sequences: int, length: int, vocabulary: int, prefix: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Token ids that were kept.

    Args:
        file: the file.
        sequences: how many are wanted: the first ones.
        length: tokens in each.
        vocabulary: how many token ids the model knows.
        prefix: the token ids that all have to begin with; None: whatever they begin with.

    Returns:
        Tensors of shape (sequences, length).

    Raises:
        ValueError: if it holds fewer, shorter ones, ones that begin otherwise, or anything else.
    """
    held = load_file(file)
    ids = held.get("input_ids")
    if ids is None or set(held) - NAMES or ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(f"{str(file)!r} is no file of own text: it holds {sorted(held)}. Name another, or delete it.")
    if len(ids) < sequences or ids.shape[1] != length or int(max(v.max() for v in held.values())) >= vocabulary:
        raise ValueError(
            f"{str(file)!r} holds {len(ids)} sequences of {ids.shape[1]} tokens, the largest {int(ids.max())}, but "
            f"{sequences} of {length} tokens below {vocabulary} are needed. Name another file, or delete this one."
        )
    with safe_open(file, "pt") as opened:
        begins = (opened.metadata() or {}).get(PREFIX, "null")
    if prefix is not None and begins != json.dumps(list(prefix)):
        raise ValueError(
            f"{str(file)!r} holds text that was sampled to begin with {begins} (null: no tokenizer was given), but "
            f"the `tokenizer` begins texts with {list(prefix)}. Name another file, or delete this one."
        )
    return {key: value[:sequences] for key, value in held.items()}


def write_text(file: str | Path, batches: Sequence[dict[str, Tensor]], prefix: Sequence[int] | None = None) -> None:
    """Keeps the batches of all ranks, and what they begin with; the file stands once it is complete."""
    held = {key: ranks.joined_over_ranks(torch.cat([batch[key] for batch in batches])) for key in batches[0]}
    if ranks.rank() == 0:
        beside = Path(f"{file}.partial")
        metadata = {PREFIX: json.dumps(None if prefix is None else list(prefix))}
        save_file({key: value.cpu().contiguous() for key, value in held.items()}, beside, metadata)
        os.replace(beside, file)
