"""Peak memory of `peft-fusion fuse` on a checkpoint that is larger than what it may take.

    python benchmarks/offloaded.py                    a random Llama of 3.5 GB in shards of 500 MB (minutes)
    python benchmarks/offloaded.py --layers 120       twice as large, in the same memory
    python benchmarks/offloaded.py --smoke            a small one; its figures mean nothing
    python benchmarks/offloaded.py --json out.json    also as JSON

The command runs as a process of its own, and so does the one in which it loads and compares its result. The peak is the
larger one's resident memory, looked at twenty times a second (needs Linux). It may be one shard and 2 GB. Pages of
mapped files, the checkpoint's and libraries', are told beside it: the system takes them back when memory is short.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

SHARD, BAR = 500, 2000  # MB
KINDS = ("RssAnon", "VmRSS")
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
    (peak, mapped), seconds = run(command), time.perf_counter() - started
    written = sum(path.stat().st_size for path in (folder / "small").glob("*.safetensors")) / 1e6
    nothing, _ = run([sys.executable, "-m", "peft_fusion.cli", "--help"])
    return {
        "the model, MB": size,
        "the result, MB": written,
        "a shard, MB": SHARD,
        "peak, MB": peak,
        "with pages of mapped files, MB": mapped,
        "peak of a command that does nothing": nothing,
        "bar, MB": SHARD + BAR,
        "seconds": seconds,
    }


def run(command: list[str]) -> tuple[float, float]:
    """Runs a command; returns the megabytes that the largest of its processes took, without and with mapped files."""
    peaks = (0.0, 0.0)
    with subprocess.Popen(command, stdout=sys.stderr) as started:
        while started.poll() is None:
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(started.pid)
                for process in [parent, *parent.children(recursive=True)]:
                    peaks = tuple(map(max, peaks, resident(process.pid)))  # type: ignore[assignment]
            time.sleep(0.05)
    if started.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {started.returncode}")
    return peaks


def resident(pid: int) -> tuple[float, float]:
    """Megabytes of a process in memory, without and with pages of files; nothing once it has ended."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        found = {
            name: int(rest.split()[0]) * 1024 / 1e6
            for name, _, rest in (line.partition(":") for line in lines)
            if name in KINDS
        }
        return found.get("RssAnon", 0.0), found.get("VmRSS", 0.0)
    return 0.0, 0.0


if __name__ == "__main__":
    main()
