"""The report of `fidelity`: its figures as dataclasses, as a table, as JSON and as a plot."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class OutputError:
    """How far outputs are from the original's.

    Args:
        absolute: the mean over tokens of the difference's L2 norm.
        relative: that, divided by the mean norm of the original's outputs.
    """

    absolute: float
    relative: float


@dataclass(frozen=True)
class KernelError:
    """How far a tangent kernel K is from the original's K0.

    Args:
        relative: |K - K0| / |K0|, in Frobenius norms.
        cosine: <K, K0> / (|K| |K0|).
        factor: the number a that makes |a K - K0| smallest.
        fitted: |a K - K0| / |K0| with that a: what of the error is not the kernel's size.
    """

    relative: float
    cosine: float
    factor: float
    fitted: float

    @classmethod
    def between(cls, kernel: Tensor, original: Tensor) -> KernelError:
        """The error of a kernel of shape (n, n) against the original's."""
        size, original_size = float(kernel.norm()), float(original.norm())
        difference, inner = float((kernel - original).norm()), float((kernel * original).sum())
        if original_size == 0:
            return cls(0.0 if size == 0 else inf, nan, nan, nan)
        if size == 0:
            return cls(1.0, nan, nan, 1.0)
        factor = inner / size**2
        fitted = float((factor * kernel - original).norm()) / original_size
        return cls(difference / original_size, inner / (size * original_size), factor, fitted)


@dataclass(frozen=True)
class NTKError:
    """The errors of both kernels over the same weights; the Adam kernel is the one the method keeps."""

    adam: KernelError
    sgd: KernelError


@dataclass(frozen=True)
class FFNFidelity:
    """One FFN.

    Args:
        name: its name in the model.
        width: its neurons in the original.
        narrow_width: its neurons now (all of them where its matrices are of low rank).
        output: the error of its output, given the original's inputs.
        ntk: over its weights and biases.
        matrices: over those of one projection; path -> errors.
    """

    name: str
    width: int
    narrow_width: int
    output: OutputError
    ntk: NTKError
    matrices: dict[str, NTKError]


@dataclass(frozen=True)
class Fidelity:
    """How close a fused model is to its original; `print` it, or see `to_json` and `plot`.

    Args:
        ffns: the FFNs that were compared.
        hidden_states: the error of the hidden states behind the last layer.
        outputs: the error of the logits (a feature model's: of its hidden states).
        ntk: over the weights and biases of all compared FFNs.
        batches: batches that the output errors are means over.
        sequences: sequences that the kernels are over.
        parameters: of the original and the fused model, the scale folded in.
        flops: of the original's and the fused model's forward, a token.
        kernels: "adam" and "sgd" -> the kernels over all compared FFNs, original and fused, (sequences, sequences).
    """

    ffns: list[FFNFidelity]
    hidden_states: OutputError
    outputs: OutputError
    ntk: NTKError
    batches: int
    sequences: int
    parameters: tuple[int, int]
    flops: tuple[float, float]
    kernels: dict[str, tuple[Tensor, Tensor]] = field(repr=False, compare=False)

    def __str__(self) -> str:
        title = f"Fidelity to the original over {self.batches} batches; tangent kernels over {self.sequences} sequences"
        name = max([len("hidden states at the end"), *(len(ffn.name) for ffn in self.ffns)])
        empty = f"{'':{name}}  {'':14}"
        lines = [
            title,
            "",
            f"{'':{name}}  {'neurons':>14}{'output error':>20}{'Adam NTK error':>26}{'SGD NTK error':>26}",
            f"{empty}{'L2':>10}{'relative':>10}" + 2 * f"{'relative':>10}{'cosine':>8}{'factor':>8}",
        ]
        for ffn in self.ffns:
            widths = f"{ffn.width} -> {ffn.narrow_width}"
            lines.append(f"{ffn.name:{name}}  {widths:>14}{_output(ffn.output)}{_ntk(ffn.ntk)}")
        lines.append(f"{'all of them':{name}}  {'':14}{'':20}{_ntk(self.ntk)}")
        for label, error in (("hidden states at the end", self.hidden_states), ("outputs", self.outputs)):
            lines.append(f"{label:{name}}  {'':14}{_output(error)}")
        lines += ["", f"parameters     {_change(*self.parameters)}", f"FLOPs a token  {_change(*self.flops)}"]
        lines.append("relative: |K - K0| / |K0|, K0 the original's kernel; factor: the a with a K closest to K0")
        return "\n".join(lines)

    def to_json(self, path: str | Path) -> None:
        """Writes every figure, the kernels left out; what is not finite is written as null.

        Args:
            path: the file to write.
        """
        figures = {name: value for name, value in vars(self).items() if name != "kernels"}
        plain = _plain({**figures, "ffns": [asdict(ffn) for ffn in self.ffns]})
        Path(path).write_text(json.dumps(plain, indent=2, allow_nan=False), encoding="utf-8")

    def plot(self, path: str | Path) -> None:
        """Draws the kernels side by side, each pair in one colour scale, and the errors of the FFNs.

        Args:
            path: the file to write, in any format that matplotlib knows by its suffix.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("`plot` needs matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(11, 6.5), layout="constrained")
        grid = figure.add_gridspec(2, 3, width_ratios=(1, 1, 1.3))
        for row, (name, errors) in enumerate((("adam", self.ntk.adam), ("sgd", self.ntk.sgd))):
            pair = self.kernels[name]
            label = {"adam": "Adam", "sgd": "SGD"}[name]
            titles = (f"{label} NTK, original", f"{label} NTK, fused (error {errors.relative:.3g})")
            low, high = min(float(k.min()) for k in pair), max(float(k.max()) for k in pair)
            axes = [figure.add_subplot(grid[row, column]) for column in range(2)]
            for axis, kernel, title in zip(axes, pair, titles, strict=True):
                image = axis.imshow(kernel.numpy(), vmin=low, vmax=high)
                axis.set_title(title, fontsize="medium")
            figure.colorbar(image, ax=axes)
        self._plot_ffns(figure.add_subplot(grid[:, 2]))
        figure.savefig(path)

    def _plot_ffns(self, axis: Any) -> None:
        """The relative errors, FFN by FFN."""
        places = range(len(self.ffns))
        axis.plot(places, [ffn.output.relative for ffn in self.ffns], "o-C0", label="output")
        axis.plot(places, [ffn.ntk.adam.relative for ffn in self.ffns], "s-C1", label="Adam NTK")
        axis.plot(places, [ffn.ntk.adam.fitted for ffn in self.ffns], "s:C1", label="Adam NTK, best factor")
        axis.plot(places, [ffn.ntk.sgd.relative for ffn in self.ffns], "^-C2", label="SGD NTK")
        axis.set(xlabel="FFN", ylabel="relative error", title="Error of each FFN", yscale="log")
        axis.legend()


def _output(error: OutputError) -> str:
    return f"{error.absolute:10.4g}{error.relative:10.3g}"


def _ntk(error: NTKError) -> str:
    return "".join(f"{e.relative:10.3g}{e.cosine:8.3f}{e.factor:8.3g}" for e in (error.adam, error.sgd))


def _change(before: float, after: float) -> str:
    """Two counts and their ratio."""
    unit, size = next(((u, s) for u, s in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if before >= s), ("", 1))
    return f"{before / size:.4g} {unit} -> {after / size:.4g} {unit} ({after / before:.1%})"


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and numbers as what JSON knows."""
    if hasattr(value, "__dataclass_fields__"):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
