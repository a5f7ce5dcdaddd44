"""Greedy generation by an original and an exported model, with every engine that is installed.

    peft-fusion fuse HuggingFaceTB/SmolLM2-135M small --ratio 0.5
    python examples/serve.py HuggingFaceTB/SmolLM2-135M small
    python examples/serve.py HuggingFaceTB/SmolLM2-135M small --engine vllm

Each engine runs each model in a process of its own (common/serve_engines.py). It is said whether an engine generates
the same tokens as transformers does, how many a second, and what memory the process takes at most. llama.cpp reads gguf
files, which `to_gguf.py` makes of both folders: name them by `--gguf ORIGINAL EXPORTED`.
"""

from __future__ import annotations

import argparse

from common.command_line import positive, run
from common.fresh_process import run_fresh
from common.reporting import text_table
from common.serve_engines import ENGINES, missing

PROMPT = "The history of science is"


def main() -> None:
    options = parse_arguments()
    rows, expected = [], {}
    for engine in options.engine:
        if lack := missing(engine):
            print(f"{engine}: skipped, {lack} is not installed")
            continue
        if engine == "llama.cpp" and not options.gguf:
            print(f"{engine}: skipped, it needs gguf files (--gguf ORIGINAL EXPORTED)")
            continue
        for role, folder in (("original", options.original), ("exported", options.exported)):
            path = folder if engine != "llama.cpp" else options.gguf[role == "exported"]
            made = run_fresh(
                "common.serve_engines:generate",
                engine=engine,
                model=path,
                tokenizer=options.original,
                prompt=options.prompt,
                tokens=options.tokens,
            )
            first = expected.setdefault(role, made["tokens"])
            same = sum(a == b for a, b in zip(first, made["tokens"], strict=False))
            figures = [f"{made['per_second']:.1f}", f"{made['peak_memory']:,.0f}", f"{same} of {len(first)}"]
            rows.append([engine, role, *figures, made["version"]])
    print(text_table(["engine", "model", "tokens/s", "peak memory, MB", "as the first engine", "version"], rows))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", help="Hub id or local path of the original model")
    parser.add_argument("exported", help="what `export` or `peft-fusion fuse` wrote")
    parser.add_argument("--engine", nargs="+", choices=list(ENGINES), default=list(ENGINES), help="default: all")
    parser.add_argument("--gguf", nargs=2, metavar=("ORIGINAL", "EXPORTED"), help="gguf files of both")
    parser.add_argument("--prompt", default=PROMPT, help="default: %(default)r")
    parser.add_argument("--tokens", type=positive, default=32, help="tokens to generate (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
