"""Draws the documentation's pictures of the figures in `docs/results/`: `python docs/plots.py`.

One line a method, labelled at the line. The figures and the commands that made them are data, in the JSON files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

RESULTS = Path(__file__).parent / "results"
BACK = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
NEAR = 0.045  # labels closer than this share of the axis are moved apart


def main() -> None:
    """Draws every picture anew; the same figures give the same file."""
    matplotlib.rcParams.update({"svg.hashsalt": "peft-fusion", "font.size": 9, "svg.fonttype": "none"})
    draw_quality(json.loads((RESULTS / "quality.json").read_text(encoding="utf-8")), RESULTS / "quality.svg")


def draw_quality(figures: dict[str, Any], path: Path) -> None:
    """Quality against size, of a language model and of a classifier.

    Args:
        figures: what `quality.json` holds.
        path: the file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4), layout="constrained")
    lines, points = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_lines(lines, figures["language_model"])
    _draw_points(points, figures["classifier"])
    for axis, told in ((lines, figures["language_model"]), (points, figures["classifier"])):
        axis.set(xlabel=told["x"], ylabel=told["y"])
        axis.set_title(told["title"], fontsize="medium", loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def _draw_lines(axis: Any, told: dict[str, Any]) -> None:
    """One line a method, each labelled at its end."""
    ends = []
    for number, line in enumerate(told["lines"]):
        x, y = zip(*line["points"], strict=True)
        axis.plot(x, y, "o-", markersize=4, color=f"C{number}")
        ends.append((x[-1], y[-1], line["label"], f"C{number}"))
    reach = max(x for x, *_ in ends)
    axis.set(xlim=(0, 1.5 * reach), ylim=(1, None))
    axis.axhline(1, color="0.7", linewidth=0.8)
    bottom, top = axis.get_ylim()
    above: dict[float, float] = {}
    for x, y, label, color in sorted(ends, key=lambda end: end[1]):
        column = next((known for known in above if abs(known - x) < reach / 10), x)
        above[column] = place = max(y, above.get(column, bottom) + NEAR * (top - bottom))
        axis.annotate(label, (x, place), (7, 0), textcoords="offset points", va="center", color=color, bbox=BACK)


def _draw_points(axis: Any, told: dict[str, Any]) -> None:
    """One point a method, labelled to its right."""
    for number, point in enumerate(told["points"]):
        axis.plot(*point["at"], "o", color=f"C{number}")
        axis.annotate(point["label"], point["at"], (7, 0), textcoords="offset points", va="center", color=f"C{number}")
    low, high = axis.get_xlim()
    axis.set_xlim(low, high + 0.8 * (high - low))  # room for the labels


if __name__ == "__main__":
    main()
