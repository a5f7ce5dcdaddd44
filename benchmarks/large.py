"""Seconds and peak memory of calibrating and fusing one decoder layer as large as those of 7B and 70B models.

    python benchmarks/large.py                       hidden 4096, FFN 11008, to a quarter (ten minutes)
    python benchmarks/large.py --shape 8192 28672    as large as a layer of a 70B model (over an hour, 16 GB)
    python benchmarks/large.py --smoke               a small one, seconds; its figures mean nothing
    python benchmarks/large.py --json out.json       also as JSON

Weights are random; in-projections of low rank, and embeddings in a subspace, give hidden activations that correlate,
so that clustering and eliminating have something to find. Quality cannot be measured on them. Peaks are resident memory
beyond what the process held with the layer in it (see memory.py), taken in a run of its own. Beside the seconds on the
clock are those of the processor divided by the threads: what the clock would say on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from memory import ALLOCATOR, read_peak, start_peak

RANK, VOCABULARY, LENGTH = 8, 4096, 64
SEVEN, SMOKE = (4096, 11008), (64, 192)
RATIO = 0.25
PEAKS = ("beyond the model, GB", "in matrices of neurons x neurons")


def main() -> None:
    options = parse_arguments()
    if options.fresh:
        figures = measure(*(SMOKE if options.smoke else options.shape), 8 if options.smoke else options.sequences)
        return print(json.dumps(figures))
    figures = in_fresh_process({})  # the allocator that tells peaks apart takes half of the time for itself
    figures |= {name: value for name, value in in_fresh_process(ALLOCATOR).items() if name in PEAKS}
    for name, value in figures.items():
        print(f"{name:36} {value:12.3f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return None


def in_fresh_process(settings: dict[str, str]) -> dict[str, float]:
    """What `measure` finds in a process that starts with such settings of its allocator; see memory.py."""
    command = [sys.executable, *sys.argv, "--fresh"]
    ended = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return figures


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=SEVEN, metavar=("HIDDEN", "WIDTH"))
    parser.add_argument("--sequences", type=int, default=128, help=f"of {LENGTH} tokens (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--smoke", action="store_true", help="a small layer: does it work?")
    parser.add_argument("--fresh", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def decoder_layer(hidden: int, width: int) -> Any:
    """A Llama of one layer, whose hidden activations correlate."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 512),
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        shared = torch.randn(hidden // RANK, hidden) / hidden**0.5
        mlp = model.model.layers[0].mlp
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
            weight.addmm_(torch.randn(width, len(shared)) * RANK**0.5 / 4, shared)
        embeddings = model.get_input_embeddings().weight
        torch.mm(torch.randn(VOCABULARY, len(shared)), shared, out=embeddings)
    return model


def measure(hidden: int, width: int, sequences: int) -> dict[str, float]:
    import torch
    from peft import get_peft_model

    from peft_fusion import FusionConfig, calibrate

    model = decoder_layer(hidden, width)
    ids = torch.randint(0, VOCABULARY, (sequences, LENGTH))
    batches = [{"input_ids": part} for part in ids.split(8)]
    config = FusionConfig(ratio=RATIO, base_weights="discard", task_type="CAUSAL_LM")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    before, started, computed = start_peak(), time.perf_counter(), time.process_time()
    calibrate(model, config, batches)
    seconds, computing = time.perf_counter() - started, time.process_time() - computed
    peak = read_peak() - before
    fused = get_peft_model(model, config)
    narrow = sum(p.numel() * p.element_size() for p in fused.parameters() if p.requires_grad)
    return {
        "threads": torch.get_num_threads(),
        "tokens": sequences * LENGTH,
        "seconds": seconds,
        "processor seconds / threads": computing / torch.get_num_threads(),
        "model, GB": size / 1e9,
        "beyond the model, GB": peak / 1e9,
        "narrow weights, GB": narrow / 1e9,
        "in matrices of neurons x neurons": peak / (4 * width**2),
    }


if __name__ == "__main__":
    main()
