"""The report of `fidelity`: its figures as dataclasses, as a table, as JSON and as a plot."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import FFNFidelity, NTKError, OutputError
from .plot import draw


@dataclass(frozen=True)
class Fidelity:
    """How close a fused model is to its original; `print` it, or see `to_json` and `plot`.

    Args:
        ffns: the FFNs that were compared.
        hidden_states: the error of the hidden states behind the last layer.
        outputs: the error of the logits (a feature model's: of its hidden states).
        divergence: KL(original || fused) of the predictions, in nats a position; NaN where there are no logits.
        ntk: over the weights and biases of all compared FFNs but routed experts; NaN if there is no other.
        batches: batches that the output errors are means over.
        sequences: sequences that the kernels are over.
        parameters: of the original and the fused model, the scale folded in.
        flops: of the original's and the fused model's forward, a token.
        kernels: "adam" and "sgd" -> the kernels over all compared FFNs, original and fused, (sequences, sequences).
    """

    ffns: list[FFNFidelity]
    hidden_states: OutputError
    outputs: OutputError
    divergence: float
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
        if isfinite(self.divergence):
            lines.append(f"{'predictions':{name}}  {'':14}{self.divergence:10.4g} nats from the original's (KL)")
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
        """Draws the kernels side by side, each pair in one colour scale, and the widths and errors of the FFNs.

        Args:
            path: the file to write, in any format that matplotlib knows by its suffix.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        draw(path, self.ffns, self.ntk, self.kernels)


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
