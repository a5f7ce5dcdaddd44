"""A function called in a process of its own. Imports nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from .errors import InputError

EXAMPLES = Path(__file__).resolve().parents[1]
CHILD = f"import sys; sys.path[0] = {str(EXAMPLES)!r}; from {__name__} import serve; serve()"


def run_fresh(function: str, **options: Any) -> Any:
    """Calls a function in a process of its own; the other end is `serve`.

    Of its own, because peak memory is a process's, and because what was saved has to prove itself without anything
    that is still in memory. Exits with the process's status where it fails: it has told why.

    Args:
        function: module and name, such as "common.quickstart_row:train_row".
        options: its keyword arguments, which JSON can hold.

    Returns:
        What it returns, which JSON can hold.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-c", CHILD, function, json.dumps(options), str(result)]
        status = subprocess.run(command).returncode
        if status:
            sys.exit(status)
        return json.loads(result.read_text(encoding="utf-8"))


def serve() -> None:
    """The other end of `run_fresh`: calls the function with the given options and hands its result back."""
    function, options, path = sys.argv[1:]
    module, name = function.split(":")
    called: Callable[..., Any] = getattr(import_module(module), name)
    try:
        result = called(**json.loads(options))
    except InputError as error:
        sys.exit(f"error: {error}")
    Path(path).write_text(json.dumps(result), encoding="utf-8")
