"""Greedy generation by an original and an exported model, with every engine that is installed.

    peft-fusion fuse HuggingFaceTB/SmolLM2-135M small --ratio 0.5
    python examples/serve.py HuggingFaceTB/SmolLM2-135M small
    python examples/serve.py HuggingFaceTB/SmolLM2-135M small --engine vllm --sequences 1 16 --prompt-tokens 64

Each engine runs each model in a process of its own (common/serve_engines.py). It is said whether an engine generates
the same tokens as transformers does, how many tokens of a prompt it reads a second (prefill) and how many it makes
(decode), and what memory the process takes at most. llama.cpp reads gguf files, which `to_gguf.py` makes of both
folders: name them by `--gguf ORIGINAL EXPORTED`.
"""

from __future__ import annotations

import argparse
from itertools import product

from common.command_line import positive, run
from common.fresh_process import run_fresh
from common.reporting import text_table
from common.serve_engines import ENGINES, missing

PROMPT = "The history of science is"
COLUMNS = ("engine", "model", "sequences", "prefill", "decode", "peak memory, MB", "as the first engine", "version")


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
        for sequences, (place, role) in product(options.sequences, enumerate(("original", "exported"))):
            made = run_fresh(
                "common.serve_engines:generate",
                engine=engine,
                model=(options.gguf if engine == "llama.cpp" else (options.original, options.exported))[place],
                tokenizer=options.original,
                prompt=options.prompt,
                tokens=options.tokens,
                sequences=sequences,
                prompt_tokens=options.prompt_tokens,
            )
            first = expected.setdefault(role, made["tokens"])
            same = sum(a == b for a, b in zip(first, made["tokens"], strict=False))
            speeds = [f"{made['prefill']:.1f}", f"{made['decode']:.1f}", f"{made['peak_memory']:,.0f}"]
            rows.append([engine, role, str(sequences), *speeds, f"{same} of {len(first)}", made["version"]])
    print(text_table(COLUMNS, rows))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", help="Hub id or local path of the original model")
    parser.add_argument("exported", help="what `export` or `peft-fusion fuse` wrote")
    parser.add_argument("--engine", nargs="+", choices=list(ENGINES), default=list(ENGINES), help="default: all")
    parser.add_argument("--gguf", nargs=2, metavar=("ORIGINAL", "EXPORTED"), help="gguf files of both")
    parser.add_argument("--prompt", default=PROMPT, help="default: %(default)r")
    parser.add_argument("--prompt-tokens", type=positive, default=0, help="repeat or cut the prompt to so many")
    parser.add_argument("--tokens", type=positive, default=32, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--sequences", type=positive, nargs="+", default=[1], help="at once (default: 1)")
    options = parser.parse_args()
    if options.tokens < 2:
        parser.error("--tokens 1: the first new token belongs to the prefill, so that decoding needs two at least.")
    return options


if __name__ == "__main__":
    run(main)
