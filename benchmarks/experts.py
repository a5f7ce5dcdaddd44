"""Time to narrow all experts of a layer, against one dense FFN for which it takes as many multiply-adds.

    python benchmarks/experts.py                 8 experts of 3584 neurons and hidden 1024, to half (minutes)
    python benchmarks/experts.py --scale 0.5     of half that size in every dimension
    python benchmarks/experts.py --smoke         tiny; its figures mean nothing
    python benchmarks/experts.py --json out.json also as JSON

Every product in clustering, elimination and refit has three dimensions (neurons, neurons or hidden, hidden or
tokens). So the dense FFN has each of them twice as large: 7168 neurons, hidden 2048, twice the tokens, and 2 ** 3 = 8
times the multiply-adds of one expert. Weights and inputs are random, the experts' tokens weighted; statistics are
collected before the clock starts. Time is the process's own (`time.process_time`) with one thread, so that a busy
machine adds little.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import silu

from peft_fusion.fusing.activations import hidden_activations
from peft_fusion.fusing.calibrated import fuse_calibrated
from peft_fusion.fusing.methods import narrow_by
from peft_fusion.fusing.recipe import Recipe
from peft_fusion.fusing.settle import settle
from peft_fusion.fusing.statistics import FFNStatistics
from peft_fusion.fusing.weights import FFNWeights

EXPERTS, NEURONS, HIDDEN, HELD_OUT = 8, 3584, 1024, 1024
BAR = 1.5


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    figures = measure(0.03125 if options.smoke else options.scale)
    for name, value in figures.items():
        print(f"{name:40} {value:10.3f}")
    print(f"bar for both ratios: {BAR}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of every dimension (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="tiny: does it work?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    return parser.parse_args()


def measure(scale: float) -> dict[str, float]:
    asked, figures = Recipe(), {}
    by_weights, calibrated = settle(asked), settle(asked, "random tokens", gradients=True)
    for name, count, size in ((f"{EXPERTS} experts", EXPERTS, scale), ("one dense FFN", 1, 2 * scale)):
        weights, statistics = made(size, weighted=count > 1)
        width = weights.width // 2

        def plainly(weights: FFNWeights = weights, width: int = width) -> object:
            return narrow_by(weights, width, by_weights)

        def by_data(weights: FFNWeights = weights, width: int = width, own: FFNStatistics = statistics) -> object:
            return fuse_calibrated(weights, width, own, silu, calibrated)

        figures[f"{name}, by weights, seconds"] = seconds(plainly, count)
        figures[f"{name}, calibrated, seconds"] = seconds(by_data, count)
    for how in ("by weights", "calibrated"):
        both = (figures[f"{name}, {how}, seconds"] for name in (f"{EXPERTS} experts", "one dense FFN"))
        figures[f"experts / dense, {how}"] = next(both) / next(both)
    return figures


def made(size: float, weighted: bool) -> tuple[FFNWeights, FFNStatistics]:
    """A gated FFN of random weights, and what a calibration would know of it."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    neurons, hidden, held_out = (int(number * size) for number in (NEURONS, HIDDEN, HELD_OUT))
    ins = (draw(neurons, hidden) / hidden**0.5, draw(neurons, hidden) / hidden**0.5)
    weights = FFNWeights(ins, (None, None), draw(neurons, hidden) / neurons**0.5, None)
    basis = draw(hidden // 4, hidden) / (hidden / 4) ** 0.5  # inputs lie near a part of the space
    statistics = FFNStatistics(neurons, hidden, room=held_out, weighted=weighted)
    for tokens, keep in ((2 * neurons, False), (held_out, True)):
        x = draw(tokens, hidden // 4) @ basis + 0.3 * draw(tokens, hidden)
        own = torch.rand(tokens, generator=generator) if weighted else None
        if keep:
            statistics.hold_out(x, own)
        else:
            statistics.add(hidden_activations(weights, silu, x), own)
    gradients = draw(512, hidden) @ draw(hidden, hidden)
    statistics.fisher = gradients.T @ gradients
    return weights, statistics


def seconds(work: Callable[[], object], times: int) -> float:
    started = time.process_time()
    for _ in range(times):
        work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
