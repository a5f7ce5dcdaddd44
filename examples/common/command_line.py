"""Command lines of the examples: what they share, and how wrong input is told."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import InputError


def example_parser(description: str | None, *, model: str, ratio: float, steps: int) -> argparse.ArgumentParser:
    """The options every example has.

    Args:
        description: the example's docstring.
        model: what `--model` may be, and the default.
        ratio: default of `--ratio`.
        steps: default of `--steps`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help=model)
    add(
        "--ratio",
        type=fraction,
        default=ratio,
        help="fraction of an FFN's neurons kept (default: %(default)s)",
    )
    add("--steps", type=positive, default=steps, help="training steps (default: %(default)s)")
    add("--output", type=Path, help="folder for what is saved (default: a new temporary one)")
    add("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    add("--smoke", action="store_true", help="a few steps and examples only: does everything work?")
    return parser


def output_folder(options: argparse.Namespace) -> Path:
    return options.output or Path(tempfile.mkdtemp(prefix="peft-fusion-"))


def write_json(options: argparse.Namespace, report: dict[str, Any]) -> None:
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def run(main: Callable[[], None]) -> None:
    """Calls `main`; input that cannot be had ends the example with its message instead of a traceback."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")


def fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def layer_indices(text: str, count: int) -> list[int]:
    """Layers of a model that has `count`, by name or as indices and ranges.

    Args:
        text: "all", "last-half", "last-two-thirds" (the last 8 of 12), or such as "3,5,8-11".
        count: how many layers there are.

    Raises:
        InputError: not of this form, or a layer the model does not have.
    """
    first = {"all": 0, "last-half": count // 2, "last-two-thirds": count // 3}
    if text in first:
        return list(range(first[text], count))
    try:
        bounds = [[int(bound) for bound in part.split("-", 1)] for part in text.split(",")]
    except ValueError:
        raise InputError(f"--layers {text}: expected {', '.join(first)}, or layers such as 3,5,8-11") from None
    layers = sorted({layer for ends in bounds for layer in range(ends[0], ends[-1] + 1)})
    if not layers or layers[-1] >= count:
        raise InputError(f"--layers {text}: the model has layers 0-{count - 1}")
    return layers
