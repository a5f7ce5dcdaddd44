"""The pictures of the documentation are those that their data make."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
FILES = sorted((DOCS / "results").glob("*.json"))


@pytest.fixture
def plots():
    spec = importlib.util.spec_from_file_location("plots", DOCS / "plots.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(picture: Path) -> set[str]:
    return set(re.findall(r">([^<>]+)</text>", picture.read_text(encoding="utf-8")))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_picture_is_that_of_its_data(file, plots):
    """Whoever changes the figures draws anew: `python docs/plots.py`."""
    told = json.loads(file.read_text(encoding="utf-8"))
    stored = file.with_suffix(".svg")
    assert plots.digest(told) in stored.read_text(encoding="utf-8")
    drawn = [one["label"] for panel in told["panels"] for kind in plots.KINDS for one in panel.get(kind, ())]
    assert set(drawn) <= words(stored)


@pytest.mark.parametrize(("kind", "value"), [("lines", [[0, 1], [50, 3]]), ("points", [20, -5]), ("bars", 7)])
def test_every_method_is_labelled(kind, value, plots, tmp_path):
    methods = [{"label": f"method {number}", "values": value} for number in range(3)]
    plots.draw({"panels": [{"title": "title", "x": "size", "y": "quality", kind: methods}]}, tmp_path / "new.svg")
    assert {"method 0", "method 1", "method 2", "title", "size", "quality"} <= words(tmp_path / "new.svg")
