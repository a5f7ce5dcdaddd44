"""Benchmarks as modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch):
    """quality.py and peers.py; what is imported for them is forgotten, whatever becomes of the test."""
    before, folders = set(sys.modules), [ROOT / "examples", ROOT / "benchmarks"]
    for folder in folders:
        monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("quality"), importlib.import_module("peers")
    for name in set(sys.modules) - before:
        file = Path(getattr(sys.modules[name], "__file__", None) or "")
        if any(file.is_relative_to(folder) for folder in folders):
            del sys.modules[name]
