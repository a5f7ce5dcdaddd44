"""Options that several commands have."""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

Original = Annotated[str, typer.Argument(help="Hub id or local path of the original model.")]
Out = Annotated[Path, typer.Argument(help="Directory to write; not there yet, or see --overwrite.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with a model; mixed widths need it.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model that is at OUT.")]
Check = Annotated[
    bool, typer.Option("--check/--no-check", help="Load the result in a fresh process and compare its outputs.")
]
Text = Annotated[
    Path | None, typer.Option("--text", help="Plain text file to measure on.", exists=True, dir_okay=False)
]
Sequences = Annotated[int, typer.Option("--sequences", help="Sequences to use.", min=1)]
Length = Annotated[int, typer.Option("--length", help="Tokens of a sequence.", min=2)]


MOST_LAYERS = 10_000
"""No model has as many; a slip of the key must not fill the memory."""


class Precision(str, Enum):
    """What weights are loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Dtype = Annotated[Precision, typer.Option("--dtype", help="Precision of the weights; auto: as stored.")]


def show(result: Any, text: str, as_json: bool) -> None:
    """Prints a result as text, or as a JSON object."""
    if as_json:
        text = json.dumps(asdict(result) if is_dataclass(result) and not isinstance(result, type) else result, indent=2)
    typer.echo(text)


def layer_numbers(text: str) -> list[int] | None:
    """Layers such as "14-29" or "3,5,8-11"; None for "all".

    Raises:
        typer.BadParameter: if it is not of this form.
    """
    if text == "all":
        return None
    try:
        bounds = [[int(bound) for bound in part.split("-", 1)] for part in text.split(",")]
        if not all(ends[0] <= ends[-1] < MOST_LAYERS for ends in bounds):
            raise ValueError
    except ValueError:
        raise typer.BadParameter(
            f'{text!r} is neither "all" nor layers such as 3,5,8-11', param_hint="--layers"
        ) from None
    return sorted({layer for ends in bounds for layer in range(ends[0], ends[-1] + 1)})
