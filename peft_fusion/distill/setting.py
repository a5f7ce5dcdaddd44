"""How a distillation trains: `Trainer`'s arguments where the user gives none, and which parameters."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging

from ..fusing.precision import has_fast_bfloat16
from ..observe import ranks
from ..observe.networks import active_narrow, every_parameter, fusion_layers

TRAINED = ("narrow", "adapters", "all")
CHECKS = 8  # how often a run of which nothing is said looks at the held-out sequences
BATCH_SIZE, LEARNING_RATE = 16, 2e-4


@contextmanager
def default_arguments(host: nn.Module, sequences: int, seed: int) -> Iterator[TrainingArguments]:
    """`Trainer`'s arguments where the user gives none; nothing is left on the disk."""
    parameter = next(host.parameters())
    steps = max(1, -(-sequences // (BATCH_SIZE * ranks.world())))
    with tempfile.TemporaryDirectory() as folder:
        yield TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            num_train_epochs=1,
            bf16=parameter.dtype == torch.float32 and has_fast_bfloat16(parameter.device),
            eval_strategy="steps",
            eval_steps=max(1, steps // CHECKS),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            use_cpu=parameter.device.type == "cpu",
            disable_tqdm=not logging.is_progress_bar_enabled() or not sys.stderr.isatty(),
            seed=seed,
        )


@contextmanager
def training(bare: nn.Module, host: nn.Module, train: str, teacher: nn.Module | None) -> Iterator[list[str]]:
    """Has the chosen parameters require gradients, and no other; modes, flags, gradients and config are put back.

    Yields:
        The names of those that train.

    Raises:
        ValueError: if there is none.
    """
    config: Any = getattr(host, "config", None)
    cache = getattr(config, "use_cache", None)
    checkpointed = getattr(host, "is_gradient_checkpointing", False)
    prepared = "_is_accelerate_prepared" in vars(bare)
    modes = {module: module.training for module in bare.modules()}
    before = {name: (parameter.requires_grad, parameter.grad) for name, parameter in every_parameter(host)}
    names = _trained_names(host, train, teacher)
    if not names:
        raise ValueError(f'`train="{train}"` leaves nothing to train: no parameter of the model is of that kind.')
    try:
        for name, parameter in host.named_parameters():
            parameter.requires_grad_(name in names)
            parameter.grad = None
        yield sorted(names)
    finally:
        for name, parameter in every_parameter(host):
            flag, gradient = before[name]
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for module, mode in modes.items():
            module.training = mode
        if config is not None and cache is not None:
            config.use_cache = cache
        if not checkpointed and getattr(host, "is_gradient_checkpointing", False):
            host.gradient_checkpointing_disable()  # type: ignore[operator]
        if not prepared:  # accelerate's mark; it would pass the model over when the user's own training prepares it
            vars(bare).pop("_is_accelerate_prepared", None)


def _trained_names(host: nn.Module, train: str, teacher: nn.Module | None) -> set[str]:
    if train == "adapters":
        return {name for name, parameter in host.named_parameters() if parameter.requires_grad}
    if train == "all":
        shared = {parameter.data_ptr() for parameter in teacher.parameters()} if teacher is not None else set()
        return {name for name, parameter in host.named_parameters() if parameter.data_ptr() not in shared}
    narrow = [n for layer in fusion_layers(host) if (n := active_narrow(layer)) is not None]
    own = {id(parameter) for module in narrow for parameter in module.parameters()}
    return {name for name, parameter in host.named_parameters() if id(parameter) in own}
