"""Full fine-tuning, LoRA and MLP Fusion of a text classifier, side by side.

    python examples/quickstart.py             # minutes on two CPU cores
    python examples/quickstart.py --smoke     # the same path in less than a minute; its figures mean nothing

Each row is trained by the plain `Trainer` in a process of its own (common/quickstart_row.py) and measured there. Then
the fused model is reloaded in fresh processes, as adapter and as merged plain model, and its outputs are compared
(common/quickstart_reload.py). The methods themselves are in common/quickstart_methods.py.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from common.command_line import example_parser, output_folder, rate, run, write_json
from common.fresh_process import run_fresh
from common.quickstart_methods import FUSED, METHODS
from common.reporting import text_table

STEPS, SMOKE_STEPS = 120, 3
TEST_EXAMPLES, SMOKE_TEST_EXAMPLES = 4000, 32  # at most


def main() -> None:
    options = parse_arguments()
    started = time.perf_counter()
    output = output_folder(options)
    rows = [train(method, options, output / folder_name(method)) for method in options.methods]
    print(f"\n{table(rows)}")
    print(f"(always answering the most frequent class: accuracy {rows[0]['majority_accuracy']:.3f})\n")
    fused = [method for method in options.methods if method in FUSED]
    fused = fused[-1:] if options.smoke else fused
    checks = [check for method in fused for check in reload(output / folder_name(method), options.model)]
    print(f"what was saved is in {output}; took {time.perf_counter() - started:.0f} s")
    write_json(options, {"rows": rows, "checks": checks})


def parse_arguments() -> argparse.Namespace:
    model = "Hub id or local path of an encoder (default: MiniLM-L6 from a pip package)"
    parser = example_parser(__doc__, model=model, ratio=0.25, steps=STEPS)
    parser.add_argument(
        "--dataset",
        default="papers",
        help="papers (default: sentence of a paper -> its role, from a pip package), wordnet (gloss -> "
        "class of noun), or a Hub id (owner/name or owner/name:config) or local path",
    )
    names = list(METHODS)
    parser.add_argument("--methods", nargs="+", choices=names, default=names, help="rows of the table (default: all)")
    parser.add_argument("--learning-rate", type=rate, help="of every row (default: what suits each method)")
    parser.add_argument("--validation", action="store_true", help="test on held-out training examples, to choose by")
    options = parser.parse_args()
    options.max_test = TEST_EXAMPLES
    if options.smoke:
        options.steps, options.max_test = SMOKE_STEPS, SMOKE_TEST_EXAMPLES
    return options


def train(method: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    print(f"{method}: {options.steps} steps", flush=True)
    return run_fresh(
        "common.quickstart_row:train_row",
        method=method,
        model=options.model,
        dataset=options.dataset,
        ratio=options.ratio,
        steps=options.steps,
        max_test=options.max_test,
        folder=str(folder),
        learning_rate=options.learning_rate,
        validation=options.validation,
    )


def reload(folder: Path, model: str | None) -> list[dict[str, Any]]:
    """What was saved of the fused model gives the same outputs again."""
    return [
        run_fresh("common.quickstart_reload:reload_adapter", folder=str(folder), model=model),
        run_fresh("common.quickstart_reload:reload_merged", folder=str(folder)),
    ]


def folder_name(method: str) -> str:
    return method.replace(" ", "-").lower()


def table(rows: list[dict[str, Any]]) -> str:
    columns = {
        "method": lambda row: row["method"],
        "parameters (merged)": lambda row: f"{row['parameters'] / 1e6:.2f} M",
        "trainable": lambda row: f"{row['trainable_parameters'] / 1e6:.2f} M",
        "s/step": lambda row: f"{row['seconds_per_step']:.3f}",
        "peak memory": lambda row: f"{row['peak_memory_mb']:.0f} MB",
        f"accuracy (n={rows[0]['test_examples']})": lambda row: f"{row['accuracy']:.3f}",
        "saved": lambda row: f"{row['saved_mb']:.1f} MB",
        "merged": lambda row: f"{row['merged_mb']:.1f} MB",
    }
    return text_table(list(columns), [[show(row) for show in columns.values()] for row in rows])


if __name__ == "__main__":
    run(main)
