"""A training step of a fused model against one of a model that was narrow from the start.

    python benchmarks/step.py                  SmolLM2-135M's shape (minutes)
    python benchmarks/step.py --smoke          a small shape, seconds; its ratio means nothing
    python benchmarks/step.py --json out.json  also as JSON

Both have the same sizes, weights of the same number train in both (their FFNs), and AdamW steps both. The steps
take turns, the order within each pair alternating, so that a busy machine slows both alike; times are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from shapes import LAYERS, SMOKE, VOCABULARY, batch, fused, native, trainable, training_step
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
    seconds = time_steps(models, inputs, options.steps)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["fused"] / medians["native"]
    paired = statistics.median(f / n for f, n in zip(seconds["fused"], seconds["native"], strict=True))
    for name, median in medians.items():
        print(f"{name:8} {1000 * median:9.1f} ms a step, {counts[name] / 1e6:.2f} M weights train")
    print(f"ratio of medians {ratio:.3f}, median of the pairs' ratios {paired:.3f} (bar {BAR})")
    if options.json:
        report = {"milliseconds": {n: 1000 * m for n, m in medians.items()}, "ratio": ratio, "paired_ratio": paired}
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


def time_steps(models: dict[str, nn.Module], inputs: dict[str, torch.Tensor], steps: int) -> dict[str, list[float]]:
    """Seconds of each model's steps, which take turns."""
    optimizers = {name: torch.optim.AdamW(trainable(model), lr=1e-4) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for step in range(WARM_UP + steps):
        order = list(models) if step % 2 else list(reversed(models))
        for name in order:
            started = time.perf_counter()
            training_step(models[name], optimizers[name], inputs)
            if step >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
