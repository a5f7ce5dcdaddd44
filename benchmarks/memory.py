"""Peak memory of training: what becomes of the original FFN weights, against LoRA and others.

    python benchmarks/memory.py                  SmolLM2-135M's shape (minutes)
    python benchmarks/memory.py --smoke          a small shape, seconds; its figures mean nothing
    python benchmarks/memory.py --json out.json  also as JSON

The fused models are calibrated ones. Each row runs in a process of its own, once in fp32 and once in bf16 as `Trainer`
has it (fp32 weights, forward pass under autocast). On a GPU it is the most memory that tensors took. On a CPU it is
resident memory less what the imports took; the peak starts anew once the model is set up (needs Linux), for setting
up holds the full-width model, whatever is dropped afterwards: that peak is in the column "set-up". There the allocator
is told to map every larger block on its own and to give it back when freed: else the holes that freed tensors leave
count as memory, differently in every run.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from shapes import PRECISIONS, SMOKE, VOCABULARY, batch, fused, llama, native, trainable, training_step

ROWS = ("native", "discard", "offload", "keep", "LoRA", "full")
BAR = 1.05
STEPS = 3
MEGABYTE = 1e6
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # bytes


def main() -> None:
    options = parse_arguments()
    if options.row:
        print(json.dumps(measure(options)))
        return
    rows = {
        precision: {row: run_fresh(__file__, "--row", row, "--precision", precision) for row in ROWS}
        for precision in PRECISIONS
    }
    print(f"{'':8}" + "".join(f"{precision + ' MB':>12} {'set-up MB':>12} {'of native':>10}" for precision in rows))
    for row in ROWS:
        cells = (
            f"{found[row]['training']:12.1f} {found[row]['set_up']:12.1f} {of_native(found, row):10.3f}"
            for found in rows.values()
        )
        print(f"{row:8}" + "".join(cells))
    ratios = {precision: of_native(found, "discard") for precision, found in rows.items()}
    print("discard / native " + ", ".join(f"{precision} {ratio:.3f}" for precision, ratio in ratios.items()), end="")
    print(f" (bar {BAR})")
    if options.json:
        options.json.write_text(json.dumps({"megabytes": rows, "ratio": ratios, "bar": BAR}, indent=2) + "\n")


def of_native(rows: dict[str, dict[str, float]], row: str) -> float:
    return rows[row]["training"] / rows["native"]["training"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.25, help="fraction of neurons kept (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=30, help="layers of the model (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--smoke", action="store_true", help="a small shape: does it work?")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=PRECISIONS, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_fresh(script: str, *more: str) -> Any:
    """What a script prints last, as JSON, in a process of its own with the same and more arguments."""
    command = [sys.executable, script, *sys.argv[1:], *more]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=os.environ | ALLOCATOR)
    return json.loads(result.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Sets up one model, trains it for a few steps, and returns the peaks of both in MB."""
    sizes = SMOKE if options.smoke else {"layers": options.layers}
    make: dict[str, Callable[[], torch.nn.Module]] = {
        "native": lambda: native(options.ratio, **sizes),
        "LoRA": lambda: get_peft_model(llama(**sizes), LoraConfig(r=16, target_modules="all-linear")),
        "full": lambda: llama(**sizes),
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = {
        k: v.to(device) for k, v in batch(options.batch, options.length, sizes.get("vocabulary", VOCABULARY)).items()
    }
    before = start_peak()
    row = options.row
    model = (make[row]() if row in make else fused(options.ratio, base_weights=row, **sizes)).to(device)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-4)
    set_up = read_peak() - before
    start_peak()
    for _ in range(STEPS):
        training_step(model, optimizer, inputs, options.precision)
    return {"set_up": set_up / MEGABYTE, "training": (read_peak() - before) / MEGABYTE}


def start_peak() -> int:
    """Gives back what is free, forgets the peak so far, and returns the bytes in use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def read_peak() -> int:
    """The most bytes that were in use since `start_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else status("VmHWM")


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
