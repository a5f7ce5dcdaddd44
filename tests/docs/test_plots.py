"""The pictures of the documentation are those that their data make."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import matplotlib
import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def plots():
    spec = importlib.util.spec_from_file_location("plots", DOCS / "plots.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with matplotlib.rc_context():
        yield module


def words(picture: Path) -> set[str]:
    return set(re.findall(r">([^<>]+)</text>", picture.read_text(encoding="utf-8")))


def test_the_picture_is_that_of_the_data(plots, tmp_path, monkeypatch):
    """Whoever changes the figures draws anew: `python docs/plots.py`."""
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    (tmp_path / "quality.json").write_text((DOCS / "results" / "quality.json").read_text(encoding="utf-8"))
    plots.main()
    shown = re.findall(r'd="(M [^"]+)"', (DOCS / "results" / "quality.svg").read_text(encoding="utf-8"))
    drawn = re.findall(r'd="(M [^"]+)"', (tmp_path / "quality.svg").read_text(encoding="utf-8"))
    assert shown == drawn
    assert words(tmp_path / "quality.svg") == words(DOCS / "results" / "quality.svg")


def test_every_method_is_labelled_at_its_line(plots, tmp_path):
    figures = json.loads((DOCS / "results" / "quality.json").read_text(encoding="utf-8"))
    figures["language_model"]["lines"].append({"label": "a new method", "points": [[0, 1], [50, 3]]})
    matplotlib.rcParams["svg.fonttype"] = "none"
    plots.draw_quality(figures, tmp_path / "new.svg")
    labels = {
        one["label"]
        for part in ("lines", "points")
        for f in figures.values()
        if isinstance(f, dict)
        for one in f.get(part, ())
    }
    assert labels <= words(tmp_path / "new.svg")
