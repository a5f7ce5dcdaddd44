"""Time and peak memory of `calibrate` and `get_peft_model` on SmolLM2-135M.

    python benchmarks/calibration.py                  128 sequences of 256 tokens, last 16 layers (minutes)
    python benchmarks/calibration.py --smoke          4 sequences of 32; its figures mean nothing
    python benchmarks/calibration.py --json out.json  also as JSON

The peak is what the process held at most while calibrating and fusing, the model included, against the model's own
size; on a CPU resident memory less what the imports took (needs Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from memory import ALLOCATOR, read_peak, start_peak

MINUTES_BAR, MEMORY_BAR = 4, 2
LAYERS = list(range(14, 30))


def main() -> None:
    options = parse_arguments()
    if not ALLOCATOR.items() <= os.environ.items():  # it is read when a process starts; see memory.py
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)
    figures = measure(options)
    for name, value in figures.items():
        print(f"{name:32} {value:8.2f}")
    print(f"bars: {MINUTES_BAR} minutes, {MEMORY_BAR} times the model")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--sequences", type=int, default=128, help="of 256 tokens (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="few and short sequences: does it work?")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, float]:
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from common.load_models import load_causal_lm
    from common.running_text import blocks, load_texts
    from peft import get_peft_model
    from torch.utils.data import DataLoader
    from transformers import default_data_collator

    from peft_fusion import FusionConfig, calibrate

    length, sequences = (32, 4) if options.smoke else (256, options.sequences)
    before = start_peak()
    model, tokenizer = load_causal_lm(None)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    batches = DataLoader(
        blocks(tokenizer, load_texts()[0], length)[:sequences],  # type: ignore[arg-type]
        batch_size=4,
        collate_fn=default_data_collator,
    )
    loaded = start_peak() - before
    config = FusionConfig(ratio=0.5, layers_to_transform=LAYERS, base_weights="discard")
    started = time.perf_counter()
    calibrate(model, config, batches, sequences=sequences)
    calibrated, peak_calibrating = time.perf_counter(), read_peak() - before
    get_peft_model(model, config)
    fused = time.perf_counter()
    return {
        "calibrate, seconds": calibrated - started,
        "get_peft_model, seconds": fused - calibrated,
        "both, minutes": (fused - started) / 60,
        "model, MB": size / 1e6,
        "resident once loaded, MB": loaded / 1e6,
        "peak calibrating / model": peak_calibrating / size,
        "peak / model": (read_peak() - before) / size,
    }


if __name__ == "__main__":
    main()
