"""The report of `fidelity` as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import FFNFidelity, NTKError

KERNELS = {"adam": "Adam", "sgd": "SGD"}


def draw(
    path: str | Path, ffns: Sequence[FFNFidelity], ntk: NTKError, kernels: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Draws the figures of a report; see `Fidelity.plot`.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("`plot` needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    grid = figure.add_gridspec(4, 3, width_ratios=(1, 1, 1.3))
    for row, name in enumerate(KERNELS):
        axes = [figure.add_subplot(grid[2 * row : 2 * row + 2, column]) for column in range(2)]
        _draw_kernels(kernels[name], f"{KERNELS[name]} NTK", getattr(ntk, name).relative, figure, axes)
    errors = figure.add_subplot(grid[1:, 2])
    _draw_widths(ffns, figure.add_subplot(grid[0, 2], sharex=errors))
    _draw_errors(ffns, errors)
    figure.savefig(path)


def _draw_kernels(pair: tuple[Tensor, Tensor], name: str, error: float, figure: Any, axes: list[Any]) -> None:
    """The original's kernel and the fused model's, in one colour scale."""
    titles = (f"{name}, original", f"{name}, fused (error {error:.3g})")
    low, high = min(float(k.min()) for k in pair), max(float(k.max()) for k in pair)
    for axis, kernel, title in zip(axes, pair, titles, strict=True):
        image = axis.imshow(kernel.numpy(), vmin=low, vmax=high)
        axis.set_title(title, fontsize="medium")
    figure.colorbar(image, ax=axes)


def _draw_widths(ffns: Sequence[FFNFidelity], axis: Any) -> None:
    """The share of its neurons that each FFN has kept."""
    axis.bar(range(len(ffns)), [ffn.narrow_width / ffn.width for ffn in ffns], color="C7")
    axis.set(ylabel="neurons kept", ylim=(0, 1), title="Width and error of each FFN")
    axis.tick_params(labelbottom=False)


def _draw_errors(ffns: Sequence[FFNFidelity], axis: Any) -> None:
    """The relative errors, FFN by FFN."""
    places = range(len(ffns))
    axis.plot(places, [ffn.output.relative for ffn in ffns], "o-C0", label="output")
    axis.plot(places, [ffn.ntk.adam.relative for ffn in ffns], "s-C1", label="Adam NTK")
    axis.plot(places, [ffn.ntk.adam.fitted for ffn in ffns], "s:C1", label="Adam NTK, best factor")
    axis.plot(places, [ffn.ntk.sgd.relative for ffn in ffns], "^-C2", label="SGD NTK")
    axis.set(xlabel="FFN", ylabel="relative error", yscale="log")
    axis.legend()
