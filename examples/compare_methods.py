"""All methods x widths x seeds on one classification task: a table as Markdown and CSV, and a plot.

    python examples/compare_methods.py --results results          MiniLM-L6 on sentences of papers; hours on two cores
    python examples/compare_methods.py --results results --methods full fusion "calibrated: fusion" --seeds 0
    python examples/compare_methods.py --model roberta-base --dataset nyu-mll/glue:sst2 --preset paper --results sst2
    python examples/compare_methods.py --smoke                    the same path in a minute; its figures mean nothing

Every finished run is a line of RESULTS/runs.jsonl and is not run again, so that the grid can be stopped and resumed,
and several processes can share it. Every row is fine-tuned in the same way, at the learning rate of the full model
(LoRA at its own). The rows are listed in common/grid_methods.py, and common/grid_run.py makes one run.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common.command_line import fraction, positive, rate, run
from common.errors import InputError
from common.fine_tuning import be_quiet
from common.grid_methods import FULL_WIDTH, METHODS
from common.grid_run import BATCH, Setting, compare
from common.paper_preset import PAPER, PAPER_UNDERSTANDING

STEPS = 150
Run = dict[str, Any]
NOT_AVERAGED = ("method", "ratio", "seed")
ONLY_IN_CSV = ("examples", "majority", "hidden-state error", "Adam-NTK cosine", "seconds to tune")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    be_quiet()
    folder: Path = options.results
    folder.mkdir(parents=True, exist_ok=True)
    check_setting(folder / "setting.json", setting(options))
    runs = folder / "runs.jsonl"
    for name, ratio, seed in grid(options):
        if (name, ratio, seed) not in {key(done) for done in read(runs)}:
            print(f"{name}, ratio {ratio}, seed {seed}", flush=True)
            figures = compare(name, ratio, seed, setting(options))
            with runs.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"method": name, "ratio": ratio, "seed": seed, **figures}) + "\n")
    rows = summarize(read(runs))
    (folder / "table.md").write_text(markdown(rows), encoding="utf-8")
    write_csv(rows, folder / "table.csv")
    plot(rows, folder / "plot.png")
    print(f"\n{markdown(rows)}\n{folder}: runs.jsonl, table.md, table.csv, plot.png")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", type=Path, help="folder of finished runs and tables (default: a new temporary one)")
    add("--model", help="Hub id or local path of an encoder (default: MiniLM-L6 from a pip package)")
    add("--dataset", default="papers", help="papers (default), wordnet, Hub id or local path, as in quickstart.py")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    add("--ratios", nargs="+", type=fraction, default=[0.25], help="fractions of neurons kept (default: 0.25)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    add("--steps", type=positive, default=STEPS, help="of fine-tuning, 32 sentences each (default: %(default)s)")
    add("--test", type=positive, help="most test sentences (default: all)")
    add("--layers", default="all", help="all, last-half, last-two-thirds, or layers such as 3,5,8-11")
    add("--learning-rate", type=rate, default=1e-4, help="of every row but LoRA (default: %(default)s)")
    add("--bf16", action="store_true", help="fine-tune in bfloat16 (weights stay float32), faster where it is fast")
    add("--preset", choices=("paper",), help="the paper's layers, width, optimizer and epochs")
    add("--smoke", action="store_true", help="a few steps and examples only: does everything work?")
    parser.set_defaults(epochs=None, settings={})
    if parser.parse_known_args(arguments)[0].preset:
        assert PAPER_UNDERSTANDING["batch_size"] == BATCH
        parser.set_defaults(ratios=[PAPER["ratio"]], layers=PAPER["layers"], steps=None, **PAPER_UNDERSTANDING)
    options = parser.parse_args(arguments)
    if options.smoke:
        options.steps, options.test, options.seeds = 2, 32, options.seeds[:1]
    options.results = options.results or Path(tempfile.mkdtemp(prefix="peft-fusion-"))
    return options


def setting(options: argparse.Namespace) -> Setting:
    return Setting(
        model=options.model,
        dataset=options.dataset,
        steps=options.steps,
        epochs=options.epochs,
        test=options.test,
        layers=options.layers,
        learning_rate=options.learning_rate,
        sequences=8 if options.smoke else 64,
        compared_seed=options.seeds[0],
        training=precision(options.bf16) | options.settings,
    )


def check_setting(path: Path, now: Setting) -> None:
    """Notes what all runs of a folder share, so that rows of different settings do not end up in one table.

    Raises:
        InputError: the folder has runs of another setting.
    """
    ours = {name: value for name, value in asdict(now).items() if name != "compared_seed"}
    theirs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else ours
    different = [
        f"{name} {theirs.get(name)!r}, not {value!r}" for name, value in ours.items() if theirs.get(name) != value
    ]
    if different:
        raise InputError(f"the runs in {path.parent} have {'; '.join(different)}: give another folder as --results")
    path.write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")


def precision(bf16: bool) -> dict[str, bool]:
    """Fields of `TrainingArguments`; on a CPU, `Trainer` takes bf16 only where it is told to stay there."""
    return {"bf16": True, "use_cpu": not torch.cuda.is_available()} if bf16 else {}


def grid(options: argparse.Namespace) -> list[tuple[str, float, int]]:
    """(method, ratio, seed) of every run; what has no width is run once, as ratio 1."""
    return [
        (name, ratio, seed)
        for seed in options.seeds
        for name in options.methods
        for ratio in ([1.0] if name in FULL_WIDTH else options.ratios)
    ]


def key(done: Run) -> tuple[str, float, int]:
    return done["method"], done["ratio"], done["seed"]


def read(path: Path) -> list[Run]:
    """The finished runs; none where there is no file yet."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def summarize(runs: Sequence[Run]) -> list[Run]:
    """A row for every method and width: the mean of each figure over its seeds, the spread of the accuracy."""
    order = list(METHODS)
    groups: dict[tuple[float, int], list[Run]] = {}
    for done in runs:
        groups.setdefault((-done["ratio"], order.index(done["method"])), []).append(done)
    rows = []
    for _, group in sorted(groups.items()):
        accuracies = [done["accuracy"] for done in group]
        row: Run = {"method": group[0]["method"], "ratio": group[0]["ratio"], "seeds": len(group)}
        row |= {"accuracy": statistics.mean(accuracies), "sd": statistics.stdev(accuracies) if group[1:] else None}
        columns = dict.fromkeys(name for done in group for name in done if name not in (*NOT_AVERAGED, "accuracy"))
        row |= {name: statistics.mean(done[name] for done in group if name in done) for name in columns}
        rows.append(row)
    return rows


def columns_of(rows: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def show(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}".removeprefix("0") if isinstance(value, float) and abs(value) < 1 else f"{value:.4g}"


def markdown(rows: Sequence[Run]) -> str:
    """The table as Markdown, without some columns."""
    columns = [name for name in columns_of(rows) if name not in ONLY_IN_CSV]
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)]]
    lines += [[row["method"], *(show(row.get(name)) for name in columns[1:])] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns_of(rows))
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: Sequence[Run], path: Path) -> None:
    """Accuracy by method, mean and spread, a colour for each width."""
    from matplotlib.figure import Figure

    names = [name for name in METHODS if any(row["method"] == name for row in rows)]
    figure = Figure(figsize=(8, 1 + 0.32 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for shift, ratio in enumerate(sorted({row["ratio"] for row in rows}, reverse=True)):
        chosen = [row for row in rows if row["ratio"] == ratio]
        places = [-names.index(row["method"]) + 0.15 * shift for row in chosen]
        label = "full width" if ratio == 1 else f"{ratio:g} of the neurons"
        spreads = [row["sd"] or 0 for row in chosen]
        axes.errorbar([row["accuracy"] for row in chosen], places, xerr=spreads, fmt="o", label=label)
    axes.set_yticks([-i for i in range(len(names))], names)
    axes.set_xlabel(f"test accuracy, mean and standard deviation of {max(row['seeds'] for row in rows)} seeds")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(main)
