"""The command line `peft-fusion`: what the package does, over models named by Hub id or path.

Figures go to stdout (with `--json` as one JSON object), progress and warnings to stderr. Exit status: 0, 1 with one
line that says what was refused and what to do, 2 where the command itself is wrong.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer
from safetensors import SafetensorError
from transformers.utils import logging

from ..observe.networks import is_out_of_memory
from .compare import compare
from .fuse import export_adapter, fuse
from .layouts import layouts
from .report import report

__all__ = ["app", "main"]

TRACEBACK = "PEFT_FUSION_TRACEBACK"
"""Environment variable: with any value, errors are raised instead of told in a line."""

app = typer.Typer(
    name="peft-fusion",
    help="Makes the feed-forward networks (FFNs) of transformers narrower. Models are Hub ids or local paths.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(layouts)
app.command()(fuse)
app.command()(report)
app.command("export")(export_adapter)
app.command()(compare)


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"peft-fusion {version('peft-fusion')}")
        raise typer.Exit


@app.callback()
def _common(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_tell_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line; what is refused is told in one line, and exits with status 1."""
    logging.set_verbosity_error()
    try:
        app()
    except (ValueError, OSError, RuntimeError, MemoryError, ImportError, SafetensorError) as error:
        if os.environ.get(TRACEBACK):
            raise
        sys.exit(f"error: {told(error)}")


def told(error: BaseException) -> str:
    """An error in one line."""
    line = " ".join(str(error).split()) or type(error).__name__
    if is_out_of_memory(error):
        return f"out of memory ({line}). Try --dtype bfloat16, fewer --sequences, or a machine with more."
    if isinstance(error, SafetensorError):
        return f"a safetensors file is damaged ({line}). Copy or download the model or adapter again."
    return line
