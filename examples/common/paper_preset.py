"""The paper's settings as a preset of options, and the options that glue.py and data_to_text.py share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .apply_method import CALIBRATED, FUSED
from .command_line import positive, rate
from .errors import InputError

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
        help=f"fuse by what goes through the FFNs (default for {', '.join(CALIBRATED)}), or by weights alone",
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
        if options.calibrate and method not in CALIBRATED:
            raise InputError(f"--calibrate works with {' and '.join(CALIBRATED)}, not with {method}")
        if options.tune_layers and method not in FUSED:
            raise InputError(f"--tune-layers works on narrow FFNs, of which {method} has none")


def training_steps(options: argparse.Namespace, examples: int) -> int:
    """`--steps`, or what the preset's epochs come to."""
    return options.steps or math.ceil(options.epochs * examples / options.batch_size)
