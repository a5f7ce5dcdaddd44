"""What quality.py shows: figures in a table, and perplexity against width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OFF_CHART = 5  # a plot shows perplexities of up to so many times the original's


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against width, a line a variant; the legend names those that are off the chart."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=colormaps["tab20"].colors)  # type: ignore[attr-defined]
    original = next((row["perplexity"] for row in rows if row["variant"] == "original"), None)
    if original:
        axes.axhline(original, color="black", linestyle=":", label="original")
    for name in dict.fromkeys(row["variant"] for row in rows if row["variant"] != "original"):
        for column, style in (("perplexity", "o-"), ("perplexity, tuned", "s--")):
            points = sorted((row["ratio"], row[column]) for row in rows if row["variant"] == name and column in row)
            label = name if column == "perplexity" else f"{name}, tuned"
            if points and original and points[-1][1] > OFF_CHART * original:
                axes.plot([], [], " ", label=f"{label}: above {min(p for _, p in points):,.0f}")
            elif points:
                axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="fraction of the neurons kept", ylabel="perplexity")
    figure.legend(fontsize=7, loc="outside right")
    figure.savefig(path, dpi=120)


def show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
