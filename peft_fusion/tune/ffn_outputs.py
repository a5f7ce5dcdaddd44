"""Every narrow FFN on its own learns to put out what the original one does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..fusing.metric import metric_root
from ..observe.batches import padding_mask, single_sequences
from ..observe.fisher import fisher_information
from ..observe.networks import Batch, Network
from ..observe.own_inputs import OWN_LENGTH, own_inputs
from ..progress import progress
from .student import Student, fit

METRIC_SEQUENCES = 128  # twice as many as in calibration, in a small part of the time that learning takes


def tune_ffn_outputs(
    original: Network,
    fused: Network,
    dataloader: Iterable[Batch] | None,
    learning_rate: float,
    steps: int,
    tokens: int,
    seed: int,
) -> dict[str, tuple[float, float]]:
    """Tunes every narrow FFN; see `tune_layers`, objective "ffn"."""
    with original.running():
        if dataloader is None:
            dataloader = own_inputs(original.model, math.ceil(tokens / OWN_LENGTH), OWN_LENGTH, seed)
        inputs, sequences = _collect_inputs(original, dataloader, tokens)
        fisher = fisher_information(original, sequences, seed) or {}
        errors = {}
        pairs = list(zip(original.ffns, fused.ffns, strict=True))
        for teacher, student in progress(pairs, "Tuning FFNs"):
            x = inputs.pop(teacher.name)
            root = metric_root(fisher[teacher.name].to(x.device)) if teacher.name in fisher else None
            errors[student.name] = fit(Student(student, teacher, root), x, learning_rate, steps, seed)
    return errors


def _collect_inputs(side: Network, dataloader: Iterable[Batch], tokens: int) -> tuple[dict[str, Tensor], list[Batch]]:
    """The inputs of every FFN, tensors of shape (tokens, in_dim), without padding, and some sequences.

    Raises:
        ValueError: if the data loader gives no batch that the model takes.
    """
    kept: dict[str, list[Tensor]] = {ffn.name: [] for ffn in side.ffns}
    sequences: list[Batch] = []
    with ExitStack() as stack, torch.no_grad():
        current: dict[str, Any] = {}
        for ffn in side.ffns:
            handle = ffn.projections[0].register_forward_pre_hook(
                _keeper(kept[ffn.name], current, side.is_encoder_decoder and "decoder" in ffn.name.split("."))
            )
            stack.callback(handle.remove)
        for batch in dataloader:
            current.clear()
            current.update(batch)
            side({key: value for key, value in batch.items() if key != "labels" or _needs_labels(side, batch)})
            sequences += islice(single_sequences(batch), METRIC_SEQUENCES - len(sequences))
            if min(sum(map(len, found)) for found in kept.values()) >= tokens:
                break
    if not all(kept.values()):
        raise ValueError("The dataloader yields no batch: give one that can be iterated anew, with at least one batch.")
    return {name: torch.cat(found)[:tokens] for name, found in kept.items()}, sequences


def _needs_labels(side: Network, batch: Batch) -> bool:
    """Whether an encoder-decoder makes its decoder's inputs from the labels."""
    return side.is_encoder_decoder and "decoder_input_ids" not in batch


def _keeper(kept: list[Tensor], batch: Batch, decoder: bool) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that keeps an FFN's inputs."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        mask = padding_mask(batch, args[0].shape, decoder)
        kept.append(args[0].flatten(0, -2) if mask is None else args[0][mask.to(args[0].device)])

    return hook
