"""A training step of a calibrated fused model against one of a model that was narrow from the start.

    python benchmarks/step.py                  SmolLM2-135M's shape (minutes)
    python benchmarks/step.py --smoke          a small shape, seconds; its ratio means nothing
    python benchmarks/step.py --json out.json  also as JSON

Both have the same sizes, weights of the same number train in both (their FFNs), and AdamW steps both, in fp32 and in
bf16 as `Trainer` has it (fp32 weights, forward pass under autocast). The steps take turns, the order within each pair
alternating, so that a busy machine slows both alike; times are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from shapes import LAYERS, PRECISIONS, SMOKE, VOCABULARY, batch, fused, native, trainable, training_step
from torch import nn

BAR = 1.03
WARM_UP = 2


def main() -> None:
    options = parse_arguments()
    sizes = SMOKE if options.smoke else {"layers": options.layers}
    models = {"fused": fused(options.ratio, **sizes), "native": native(options.ratio, **sizes)}
    counts = {name: sum(p.numel() for p in trainable(model)) for name, model in models.items()}
    if len(set(counts.values())) != 1:
        raise SystemExit(f"the models train different numbers of weights: {counts}")
    inputs = batch(options.batch, options.length, sizes.get("vocabulary", VOCABULARY))
    print(f"{sum(counts.values()) / len(counts) / 1e6:.2f} M weights train, {options.steps} pairs of steps")
    print(f"{'':6} {'fused ms':>10} {'native ms':>10} {'medians':>9} {'pairs':>7}   (bar {BAR})")
    report: dict[str, dict[str, float]] = {}
    for precision in PRECISIONS:
        report[precision] = found = compare(time_steps(models, inputs, options.steps, precision))
        print(
            f"{precision:6} {found['fused']:10.1f} {found['native']:10.1f} {found['ratio']:9.3f}"
            f" {found['paired_ratio']:7.3f}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(report | {"bar": BAR, "steps": options.steps}, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.25, help="fraction of neurons kept (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=LAYERS, help="layers of the model (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="sequences (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--smoke", action="store_true", help="a small shape and few steps: does it work?")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.length = 5, 32
    return options


def time_steps(
    models: dict[str, nn.Module], inputs: dict[str, torch.Tensor], steps: int, precision: str
) -> dict[str, list[float]]:
    """Seconds of each model's steps, which take turns."""
    optimizers = {name: torch.optim.AdamW(trainable(model), lr=1e-4) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for step in range(WARM_UP + steps):
        order = list(models) if step % 2 else list(reversed(models))
        for name in order:
            started = time.perf_counter()
            training_step(models[name], optimizers[name], inputs, precision)
            if step >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def compare(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The medians in milliseconds, their ratio, and the median of the ratios within each pair of steps."""
    medians = {name: 1000 * statistics.median(times) for name, times in seconds.items()}
    pairs = zip(seconds["fused"], seconds["native"], strict=True)
    paired = statistics.median(fused / native for fused, native in pairs)
    return {**medians, "ratio": medians["fused"] / medians["native"], "paired_ratio": paired}


if __name__ == "__main__":
    main()
