"""A step of `distill` against one of plain training of the same weights: time, and peak memory.

    python benchmarks/distill.py                  SmolLM2-135M's shape (minutes)
    python benchmarks/distill.py --smoke          a small shape, seconds; its figures mean nothing
    python benchmarks/distill.py --json out.json  also as JSON

Both are `Trainer`'s steps on one model, whose last 16 of 30 FFNs are narrow and alone train, without the optimizer's,
which is the same. They take turns, so that a busy machine slows both alike. "unshared" is the same distillation with
all layers run twice. Memory is the most that a step takes beyond the model, each in a process of its own (see
memory.py), in batches of logits, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from memory import ALLOCATOR, MEGABYTE, read_peak, start_peak
from peft import get_peft_model
from shapes import LAYERS, SMOKE, VOCABULARY, batch, llama
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from peft_fusion import FusionConfig
from peft_fusion.distill.predictions import Predictions
from peft_fusion.distill.trainer import Distillation
from peft_fusion.observe.shared_layers import shared_layers
from peft_fusion.observe.unwrap import unwrapped

KINDS = ("plain", "distill", "unshared")
PRECISIONS = ("fp32", "bf16")
BAR = 1.4
WARM_UP = 1


def main() -> None:
    options = parse_arguments()
    if options.kind:
        print(json.dumps(peak(options)))
        return
    report: dict[str, Any] = {}
    for precision in PRECISIONS:
        seconds = time_steps(options, precision)
        memory = {kind: run_fresh(kind, precision) for kind in KINDS}
        report[precision] = {"seconds": seconds, "megabytes": memory}
        logits = logits_size(options, precision) / MEGABYTE
        for kind in KINDS:
            beyond = (memory[kind] - memory["plain"]) / logits
            print(
                f"{precision} {kind:9} {1000 * seconds[kind]:8.0f} ms {seconds[kind] / seconds['plain']:6.2f} x "
                f"(bar {BAR}){memory[kind]:9.0f} MB, beyond plain {beyond:5.2f} batches of logits (bar 1)",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="sequences (default: %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="tokens of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--smoke", action="store_true", help="a small shape and few steps: does it work?")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=PRECISIONS, help=argparse.SUPPRESS)
    return parser.parse_args()


def narrow_model(options: argparse.Namespace) -> nn.Module:
    sizes = SMOKE if options.smoke else {"layers": LAYERS}
    layers = list(range(sizes["layers"] * 14 // 30, sizes["layers"]))
    return get_peft_model(llama(**sizes), FusionConfig(ratio=0.5, layers_to_transform=layers, init_weights=False))


def trainer_of(kind: str, model: nn.Module, precision: str) -> Trainer:
    arguments = TrainingArguments(
        tempfile.gettempdir(),
        bf16=precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments) if kind == "plain" else distillation(kind, model, arguments)
    trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
    return trainer


def distillation(kind: str, model: nn.Module, arguments: TrainingArguments) -> Distillation:
    host = unwrapped(model)
    names = [name for name, parameter in host.named_parameters() if parameter.requires_grad]
    shared = shared_layers(host, names) if kind == "distill" else None
    predictions = Predictions("logits", is_encoder_decoder=False)
    return Distillation(predictions=predictions, teacher=None, shared=shared, model=model, args=arguments)


def inputs_of(options: argparse.Namespace, kind: str) -> dict[str, Tensor]:
    vocabulary = SMOKE["vocabulary"] if options.smoke else VOCABULARY
    found = batch(options.batch, options.length, vocabulary)
    return found if kind == "plain" else {"input_ids": found["input_ids"]}


def time_steps(options: argparse.Namespace, precision: str) -> dict[str, float]:
    """The median seconds of each kind of step, which take turns."""
    model = narrow_model(options)
    trainers = {kind: trainer_of(kind, model, precision) for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for step in range(WARM_UP + options.steps):
        for kind in KINDS if step % 2 else reversed(KINDS):
            started = time.perf_counter()
            trainers[kind].training_step(model, inputs_of(options, kind))
            model.zero_grad()
            if step >= WARM_UP:
                seconds[kind].append(time.perf_counter() - started)
    return {kind: statistics.median(times) for kind, times in seconds.items()}


def run_fresh(kind: str, precision: str) -> float:
    """The peak of one kind of step, by this script in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--kind", kind, "--precision", precision]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=os.environ | ALLOCATOR)
    return float(json.loads(result.stdout.splitlines()[-1]))


def peak(options: argparse.Namespace) -> float:
    """Megabytes that a step takes beyond the model."""
    model = narrow_model(options)
    trainer = trainer_of(options.kind, model, options.precision)
    before = start_peak()
    for _ in range(2):
        trainer.training_step(model, inputs_of(options, options.kind))
        model.zero_grad()
    return (read_peak() - before) / MEGABYTE


def logits_size(options: argparse.Namespace, precision: str) -> int:
    """Bytes of a batch of logits."""
    vocabulary = SMOKE["vocabulary"] if options.smoke else VOCABULARY
    return options.batch * options.length * vocabulary * (4 if precision == "fp32" else 2)


if __name__ == "__main__":
    main()
