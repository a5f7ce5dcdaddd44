"""Draws the documentation's pictures: every `docs/results/NAME.json` as `NAME.svg`, by `python docs/plots.py`.

A file has panels, and a panel lines, points or bars: one a method, labelled where it is. Each names the command that
measured it. The figures are all in the files, so that a picture is drawn anew when they change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
STYLE = {"svg.hashsalt": "peft-fusion", "svg.fonttype": "none", "font.size": 9}
BACK = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
NEAR = 0.045  # labels closer than this share of the axis are moved apart


def main() -> None:
    """Draws every picture anew; the same figures give the same file."""
    for file in sorted(RESULTS.glob("*.json")):
        draw(json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".svg"))


def draw(told: dict[str, Any], path: Path) -> None:
    """Draws one picture.

    Args:
        told: what a file holds: `panels`, each with `title`, `x`, `y` and `lines`, `points` or `bars`.
        path: the file to write.
    """
    with matplotlib.rc_context(STYLE):
        panels = told["panels"]
        figure = Figure(figsize=(5.25 * len(panels), told.get("height", 4)), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=[panel.get("width", 1) for panel in panels])
        for axis, panel in zip(axes[0], panels, strict=True):
            axis.set_title(panel["title"], fontsize="medium", loc="left")
            axis.set(xlabel=panel["x"], ylabel=panel.get("y"))
            axis.spines[["top", "right"]].set_visible(False)
            for kind in KINDS.keys() & panel.keys():
                KINDS[kind](axis, panel[kind])
        figure.savefig(path, metadata={"Date": None, "Description": digest(told)})


def digest(told: dict[str, Any]) -> str:
    """What a picture bears of its figures, so that one sees whether it is that of its file."""
    return "figures " + hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _lines(axis: Any, lines: list[dict[str, Any]]) -> None:
    """One line a method, labelled at its end."""
    ends = []
    for number, line in enumerate(lines):
        x, y = zip(*line["values"], strict=True)
        axis.plot(x, y, "o-", markersize=4, color=f"C{number}")
        ends.append((x[-1], y[-1], line["label"], f"C{number}"))
    reach = max(x for x, *_ in ends)
    axis.set(xlim=(0, 1.5 * reach), ylim=(min(y for line in lines for _, y in line["values"]), None))
    bottom, top = axis.get_ylim()
    columns: dict[float, float] = {}  # where labels of about one x have come to
    for x, y, label, color in sorted(ends, key=lambda end: end[1]):
        column = next((known for known in columns if abs(known - x) < reach / 10), x)
        columns[column] = place = max(y, columns.get(column, bottom) + NEAR * (top - bottom))
        _label(axis, label, (x, place), color)


def _points(axis: Any, points: list[dict[str, Any]]) -> None:
    """One point a method, labelled to its right."""
    for number, point in enumerate(points):
        axis.plot(*point["values"], "o", color=f"C{number}")
        _label(axis, point["label"], point["values"], f"C{number}")
    low, high = axis.get_xlim()
    axis.set_xlim(low, high + 0.8 * (high - low))  # room for the labels


def _bars(axis: Any, bars: list[dict[str, Any]]) -> None:
    """One bar a method, the first on top, its figure at its end."""
    axis.barh(
        [bar["label"] for bar in bars], [bar["values"] for bar in bars], color=[f"C{n}" for n in range(len(bars))]
    )
    for number, bar in enumerate(bars):
        _label(axis, f"{bar['values']:g}", (bar["values"], number), f"C{number}")
    axis.invert_yaxis()
    axis.margins(x=0.15)


def _label(axis: Any, text: str, place: tuple[float, float], color: str) -> None:
    axis.annotate(
        text, place, (7, 0), textcoords="offset points", va="center", color=color, bbox=BACK, annotation_clip=False
    )


KINDS: dict[str, Callable[[Any, list[dict[str, Any]]], None]] = {"lines": _lines, "points": _points, "bars": _bars}

if __name__ == "__main__":
    main()
