"""A model made ready for training by any of the methods that glue.py and data_to_text.py offer, by name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import chain, repeat
from typing import Any

import torch
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from peft_fusion import FusionConfig, calibrate, tune_layers

from .command_line import layer_indices
from .trainable_parts import head, with_lora

FUSED = ("fusion", "clustering", "sketch", "mmd", "svd", "pruning")  # `method` of a `FusionConfig`
CALIBRATED = ("fusion", "pruning")  # those that `calibrate` serves
METHODS = ("full", "lora", *FUSED)


def is_calibrated(method: str, options: argparse.Namespace) -> bool:
    return method in CALIBRATED and options.calibrate is not False


def prepare(
    model: PreTrainedModel,
    method: str,
    task_type: str,
    train: Sequence[dict[str, Any]],
    collator: Callable[[list], dict],
    options: argparse.Namespace,
    *,
    learning_rate: float,
    sequences: int,
    seed: int = 0,
) -> torch.nn.Module:
    """The model that a method trains, narrow already and, where `--tune-layers` says so, tuned.

    Args:
        model: changed in place.
        method: one of `METHODS`.
        task_type: PEFT's, such as "SEQ_CLS".
        train: tokenised examples, to calibrate and tune on.
        collator: makes a batch of them.
        options: as `paper_preset.parse` returns them.
        learning_rate: of the tuning; the one of fine-tuning, as in the paper.
        sequences: to calibrate on, at most.
        seed: of the clustering and of the examples' order.
    """
    if method == "full":
        return model
    if method == "lora":
        return with_lora(model, task_type)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # `Trainer` would, but only after the fusion
    order = torch.Generator().manual_seed(seed)
    batches: DataLoader = DataLoader(
        train,  # type: ignore[arg-type]
        options.batch_size,
        shuffle=True,
        generator=order,
        collate_fn=collator,
    )
    config = fusion_config(model, method, task_type, options, seed)
    if is_calibrated(method, options):
        calibrate(model, config, batches, sequences=sequences)
    fused = get_peft_model(model, config)
    if options.tune_layers:
        endless = chain.from_iterable(repeat(batches))
        tune_layers(fused, endless, objective="hidden_states", learning_rate=learning_rate, steps=options.tune_layers)
    return fused


def fusion_config(
    model: PreTrainedModel, method: str, task_type: str, options: argparse.Namespace, seed: int
) -> FusionConfig:
    return FusionConfig(
        task_type=task_type,
        method=method,
        ratio=options.ratio,
        layers_to_transform=layer_indices(options.layers, model.config.get_text_config().num_hidden_layers),
        modules_to_save=head(model),
        seed=seed,
    )
