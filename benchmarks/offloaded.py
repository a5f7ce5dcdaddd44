"""Peak memory of `peft-fusion fuse` on a checkpoint that is larger than what it may take.

    python benchmarks/offloaded.py                    a random Llama of 3.5 GB in shards of 500 MB (minutes)
    python benchmarks/offloaded.py --layers 120       twice as large, in the same memory
    python benchmarks/offloaded.py --smoke            a small one; its figures mean nothing
    python benchmarks/offloaded.py --json out.json    also as JSON

The command runs as a process of its own, and so does the one in which it loads and compares its result. The peak is the
larger one's resident memory, libraries and pages of mapped files included (needs Linux). It may be one shard and 2 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARD, BAR = 500, 2000  # MB
SIZES = {"hidden_size": 2048, "intermediate_size": 2048, "num_attention_heads": 16, "vocab_size": 8192}
SMOKE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "vocab_size": 128}


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = measure(Path(folder), options)
    for name, value in figures.items():
        print(f"{name:36} {value:12.1f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=60, help="of 59 MB each (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write it, and the result, for a while")
    parser.add_argument("--no-check", action="store_true", help="leave out the comparison of outputs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--smoke", action="store_true", help="a small model: does it work?")
    return parser.parse_args()


def write_model(folder: Path, smoke: bool, layers: int) -> float:
    """Writes a checkpoint of random weights in bf16, in a process of its own; returns its megabytes."""
    sizes = {**(SMOKE if smoke else SIZES), "num_hidden_layers": 2 if smoke else layers, "tie_word_embeddings": True}
    text = (
        "import torch; from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"torch.set_default_dtype(torch.bfloat16); model = LlamaForCausalLM(LlamaConfig(**{sizes!r}))\n"
        f"model.save_pretrained({str(folder)!r}, max_shard_size='{SHARD}MB')"
    )
    subprocess.run([sys.executable, "-c", text], check=True)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    size = write_model(folder / "model", options.smoke, options.layers)
    started = time.perf_counter()
    command = [sys.executable, "-m", "peft_fusion.cli", "fuse", str(folder / "model"), str(folder / "small")]
    command += ["--no-check"] if options.no_check else []
    peak, seconds = run(command), time.perf_counter() - started
    written = sum(path.stat().st_size for path in (folder / "small").glob("*.safetensors")) / 1e6
    nothing = run([sys.executable, "-m", "peft_fusion.cli", "--help"])
    return {
        "the model, MB": size,
        "the result, MB": written,
        "a shard, MB": SHARD,
        "peak, MB": peak,
        "peak of a command that does nothing": nothing,
        "bar, MB": SHARD + BAR,
        "seconds": seconds,
    }


def run(command: list[str]) -> float:
    """Runs a command; returns the megabytes that the largest of its processes took."""
    text = "import subprocess, resource, sys; subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr)\n"
    text += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", text, *command], stdout=subprocess.PIPE, check=True, text=True)
    return int(done.stdout.split()[-1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
