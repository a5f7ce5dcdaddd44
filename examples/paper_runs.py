"""What glue.py and data_to_text.py share: options, the paper's settings, a model made ready by any method."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, repeat
from typing import Any

import torch
from arguments import layer_indices, positive, rate
from methods import head, with_lora
from packages import InputError
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from peft_fusion import FusionConfig, calibrate, tune_layers
from peft_fusion.tuner.config import METHODS as FUSED
from peft_fusion.tuner.recipe import CALIBRATED_METHODS

METHODS = ("full", "lora", *FUSED)
# The paper fuses the last 8 of 12 layers from 3072 neurons to 768, by their weights alone.
PAPER: dict[str, Any] = {"ratio": 0.25, "layers": "last-two-thirds", "calibrate": False, "steps": None}

# On GLUE: Adam (.9, .98), epsilon 1e-6, weight decay .1, warm-up over 6 % of the steps, then polynomial decay.
PAPER_UNDERSTANDING: dict[str, Any] = {
    "batch_size": 32,
    "epochs": 10,
    "learning_rate": 4e-5,
    "settings": {
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-6,
        "weight_decay": 0.1,
        "lr_scheduler_type": "polynomial",
        "warmup_steps": 0.06,  # of all steps
    },
}


def add_options(parser: argparse.ArgumentParser, *, layers: str, batch_size: int, learning_rate: str) -> None:
    """The options of both examples beside those that every example has.

    Args:
        parser: gets them.
        layers: default of `--layers`.
        batch_size: default of `--batch-size`.
        learning_rate: the default in words.
    """
    add = parser.add_argument
    help_layers = "all, last-half, last-two-thirds, or layers such as 3,5,8-11 (default: %(default)s)"
    add("--layers", default=layers, help=help_layers)
    add(
        "--calibrate",
        action=argparse.BooleanOptionalAction,
        help=f"fuse by what goes through the FFNs (default for {', '.join(CALIBRATED_METHODS)}), or by weights alone",
    )
    add(
        "--tune-layers",
        type=positive,
        metavar="STEPS",
        help="tune the narrow FFNs first, without labels",
    )
    add("--batch-size", type=positive, default=batch_size, help="default: %(default)s")
    add("--learning-rate", type=rate, help=f"default: {learning_rate}")
    add("--max-train", type=positive, help="most training examples, drawn at random (default: all that are needed)")


def parse(
    parser: argparse.ArgumentParser, preset: Mapping[str, Any], arguments: Sequence[str] | None
) -> argparse.Namespace:
    """The options; `--preset paper` changes the defaults to `preset`, so that what is given beside it wins.

    `epochs` and `settings` (fields of `TrainingArguments`) are no options; only a preset sets them.
    """
    parser.add_argument("--preset", choices=("paper",), help="the paper's settings (default: short and calibrated)")
    parser.set_defaults(epochs=None, settings={})
    if parser.parse_known_args(arguments)[0].preset:
        parser.set_defaults(**PAPER | dict(preset))
    return parser.parse_args(arguments)


def check_methods(methods: Sequence[str], options: argparse.Namespace) -> None:
    """Refuses what would be ignored.

    Raises:
        InputError: `--calibrate` or `--tune-layers` with a method that cannot use it.
    """
    for method in methods:
        if options.calibrate and method not in CALIBRATED_METHODS:
            raise InputError(f"--calibrate works with {' and '.join(CALIBRATED_METHODS)}, not with {method}")
        if options.tune_layers and method not in FUSED:
            raise InputError(f"--tune-layers works on narrow FFNs, of which {method} has none")


def training_steps(options: argparse.Namespace, examples: int) -> int:
    """`--steps`, or what the preset's epochs come to."""
    return options.steps or math.ceil(options.epochs * examples / options.batch_size)


def is_calibrated(method: str, options: argparse.Namespace) -> bool:
    return method in CALIBRATED_METHODS and options.calibrate is not False


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
        options: as `parse` returns them.
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
