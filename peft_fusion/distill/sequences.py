"""What is distilled on: sequences of data without labels, or of the model's own making."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from ..observe import ranks
from ..observe.batches import Batch, check_batch, single_sequences, token_mask, unlabelled
from ..observe.networks import Network
from ..observe.own_inputs import own_inputs

HELD_OUT, MOST_HELD_OUT = 16, 64
"""One sequence in so many is held out, but no more than so many of them."""

Example = dict[str, Tensor]
"""The inputs of one sequence, without a dimension that counts sequences."""


def split(sequences: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Those to learn from, and those to judge by, taken evenly from all of them.

    Raises:
        ValueError: if there are fewer than two.
    """
    if len(sequences) < 2:
        raise ValueError(f"Distillation needs at least 2 sequences, one of them to judge by, but got {len(sequences)}.")
    step = max(2, min(HELD_OUT, len(sequences)), -(-len(sequences) // MOST_HELD_OUT))
    judged = set(range(step - 1, len(sequences), step))
    return [s for i, s in enumerate(sequences) if i not in judged], [sequences[i] for i in sorted(judged)]


def own_sequences(
    network: Network, tokens: int, length: int, seed: int, file: str | Path | None, prefix: Sequence[int] | None
) -> list[Example]:
    """As many of a length as make up so many tokens, made by the original itself."""
    count = max(2, -(-tokens // length))
    batches = own_inputs(network.model, count, length, seed, file, prefix)
    joined = {key: ranks.joined_over_ranks(torch.cat([batch[key] for batch in batches])) for key in batches[0]}
    return list(_sequences(joined))


def given_sequences(network: Network, data: Iterable[Any] | Dataset, tokens: int | None) -> list[Example]:
    """Those of batches, of a data loader or of a dataset, up to so many tokens.

    Raises:
        ValueError: if there is none, or something is neither a batch nor a sequence.
    """
    found: list[Example] = []
    count = 0
    for item in _items(data):
        batch = _as_batch(item)
        check_batch(batch)
        for sequence in _sequences(unlabelled(batch, network.is_encoder_decoder)):
            if tokens is not None and count >= tokens:
                return found
            found.append(sequence)
            count += _length(sequence)
    return found


def _items(data: Iterable[Any] | Dataset) -> Iterator[Any]:
    if isinstance(data, Iterable):
        yield from data
    else:  # a dataset that is only indexed
        yield from (data[i] for i in range(len(data)))  # type: ignore[arg-type]


def _as_batch(item: Any) -> Any:
    """A dataset's sequence as a batch of one; a batch as it is."""
    if not isinstance(item, Mapping):
        return item
    tensors = {key: v if isinstance(v, Tensor) else _tensor(v) for key, v in item.items()}
    kept = {key: value for key, value in tensors.items() if value is not None}
    ids = kept.get("input_ids")
    single = ids is not None and ids.dim() == 1 or ids is None and not any(v.dim() in (2, 4) for v in kept.values())
    return {key: value.unsqueeze(0) for key, value in kept.items()} if single else kept


def _tensor(value: Any) -> Tensor | None:
    """Numbers of a dataset as a tensor; None of what is none, a text say."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _sequences(batch: Batch) -> Iterator[Example]:
    """A batch's sequences one by one, without padding."""
    for one in single_sequences(batch):
        yield _unpadded({key: value[0] for key, value in one.items() if isinstance(value, Tensor) and value.dim()})


def _unpadded(sequence: Example) -> Example:
    mask = sequence.get("attention_mask")
    if mask is None or mask.dim() != 1 or bool(mask.all()):
        return sequence
    beside = {key for key, v in sequence.items() if v.shape == mask.shape and not key.startswith(("decoder", "labels"))}
    return {key: value[mask.bool()] if key in beside else value for key, value in sequence.items()}


def _length(sequence: Example) -> int:
    mask = token_mask({key: value.unsqueeze(0) for key, value in sequence.items()}, decoder=False)
    if mask is not None:
        return int(mask.sum())
    return len(sequence["input_ids"]) if "input_ids" in sequence else 1


class Sequences(Dataset):
    """Sequences as `Trainer` takes them."""

    def __init__(self, sequences: Sequence[Example]) -> None:
        self._sequences = sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> Example:
        return self._sequences[index]


def collate(sequences: Sequence[Example]) -> dict[str, Tensor]:
    """A batch of sequences, padded on the right and masked where their lengths differ."""
    batch = {}
    for key in sequences[0]:
        values = [sequence[key] for sequence in sequences]
        if values[0].dim() == 1 and len({len(value) for value in values}) > 1:
            most, filler = max(map(len, values)), -100 if key == "labels" else 0
            batch[key] = torch.stack([pad(value, (0, most - len(value)), value=filler) for value in values])
            mask = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}.get(key)
            if mask is not None and mask not in sequences[0]:
                batch[mask] = torch.stack([(torch.arange(most) < len(value)).long() for value in values])
        else:
            batch[key] = torch.stack(values)
    return batch
