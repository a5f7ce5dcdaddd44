"""Time and peak memory of `calibrate` and `get_peft_model` on SmolLM2-135M.

    python benchmarks/calibration.py                  128 sequences of 256 tokens, last 16 layers (minutes)
    python benchmarks/calibration.py --ffns-per-pass 4  in groups of FFNs: less memory, the same weights
    python benchmarks/calibration.py --smoke          4 sequences of 32; its figures mean nothing
    python benchmarks/calibration.py --json out.json  also as JSON

The peak is what the process held at most while calibrating and fusing; on a CPU resident memory (needs Linux). Beyond
the model as it was loaded it may be one group's statistics and a tenth of the model, the narrow weights, which
are asked for, not counted. A model of two small layers is calibrated before, so that pages of libraries and of the
interpreter that the first calibration of a process brings into memory are not taken for its own. The checksum tells
whether two runs made the same narrow weights.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from memory import ALLOCATOR, read_peak, start_peak

MINUTES_BAR = 2.5
LAYERS = list(range(14, 30))


def main() -> None:
    options = parse_arguments()
    if not ALLOCATOR.items() <= os.environ.items():  # it is read when a process starts; see memory.py
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)
    figures = measure(options)
    for name, value in figures.items():
        print(f"{name:36} {value:12.4f}")
    print(f"bar for both: {MINUTES_BAR} minutes on two idle cores")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--sequences", type=int, default=128, help="of 256 tokens (default: %(default)s)")
    parser.add_argument("--ffns-per-pass", type=int, default=len(LAYERS), help="FFNs of a group (default: all)")
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
    from peft_fusion.fusing.statistics import SAMPLE_TOKENS

    length, sequences = (32, 4) if options.smoke else (256, options.sequences)
    model, tokenizer = load_causal_lm(None)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    batches = DataLoader(
        blocks(tokenizer, load_texts()[0], length)[:sequences],  # type: ignore[arg-type]
        batch_size=4,
        collate_fn=default_data_collator,
    )
    width, dim, group = model.config.intermediate_size, model.config.hidden_size, options.ffns_per_pass
    statistics = 4 * group * (width**2 + dim**2 + SAMPLE_TOKENS * dim)
    narrow = 4 * len(LAYERS) * 3 * dim * width // 2
    config = FusionConfig(ratio=0.5, layers_to_transform=LAYERS, base_weights="discard")
    warm_up()
    loaded = start_peak()
    started = time.perf_counter()
    calibrate(model, config, batches, sequences=sequences, ffns_per_pass=group)
    calibrated, peak_calibrating = time.perf_counter(), read_peak() - loaded
    fused = get_peft_model(model, config)
    finished = time.perf_counter()
    beyond = read_peak() - loaded
    return {
        "calibrate, seconds": calibrated - started,
        "get_peft_model, seconds": finished - calibrated,
        "both, minutes": (finished - started) / 60,
        "model, MB": size / 1e6,
        "narrow weights, MB": narrow / 1e6,
        "a group's statistics, MB": statistics / 1e6,
        "beyond the model, calibrating, MB": peak_calibrating / 1e6,
        "beyond the model, MB": beyond / 1e6,
        "beyond model and narrow, MB": (beyond - narrow) / 1e6,
        "bar for that, MB": (statistics + size / 10) / 1e6,
        "checksum": sum(float(p.double().abs().sum()) for p in fused.parameters() if p.requires_grad),
    }


def warm_up() -> None:
    """Calibrates and fuses a small model: all that a calibration runs is in memory afterwards."""
    import torch
    from peft import get_peft_model
    from shapes import SMOKE, llama

    from peft_fusion import FusionConfig, calibrate

    model, config = llama(**SMOKE), FusionConfig(ratio=0.5)
    calibrate(model, config, [{"input_ids": torch.arange(256).reshape(4, 64)}] * 2)
    get_peft_model(model, config)


if __name__ == "__main__":
    main()
