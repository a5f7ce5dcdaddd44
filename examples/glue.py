"""Text classification and regression with narrow FFNs: GLUE, or any task like its tasks.

    python examples/glue.py                                    # MiniLM-L6, roles of sentences; minutes on two CPU cores
    python examples/glue.py --smoke                            # the same path in seconds; its figures mean nothing
    python examples/glue.py --preset paper --model FacebookAI/roberta-base --task sst2 --learning-rate 2e-5
    python examples/glue.py --model bert-base-uncased --dataset reviews.csv --method pruning

`--preset paper` is the paper's: FFNs of the last two thirds of the layers to a quarter of their width by weights
alone, Adam (betas .9 and .98, epsilon 1e-6), weight decay .1, 10 epochs of batches of 32, warm-up over 6 % of the
steps, then polynomial decay. The paper searched the learning rate between 1e-5 and 8e-5.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.apply_method import FUSED, METHODS, prepare
from common.classifiers import save_merged, tokenize
from common.command_line import example_parser, output_folder, positive, run, write_json
from common.fine_tuning import be_quiet, fine_tune
from common.glue_tasks import TASKS, TaskData, load_task, measure
from common.load_models import classifier_path, load_classifier, load_tokenizer
from common.paper_preset import PAPER_UNDERSTANDING, add_options, check_methods, parse, training_steps
from common.reporting import text_table
from common.text_tasks import draw
from transformers import DataCollatorWithPadding, Trainer

STEPS, SMOKE_STEPS, SMOKE_TEST = 120, 3, 32
CALIBRATION_SEQUENCES = 512
# For the default task at 120 steps. Calibrated fusion takes 5e-4 at times, and at others stops learning at that.
LEARNING_RATES = {"full": 1e-4, "lora": 1e-3, "fused": 2e-4}

# test split -> metric -> value
Scores = dict[str, dict[str, float]]


def main() -> None:
    options = parse_arguments()
    be_quiet()
    task = load_task(options.dataset, options.task)
    output = output_folder(options)
    runs = []
    for seed in options.seeds:
        scores, figures = fine_tuned(task, options, seed, output / f"seed-{seed}")
        runs.append({"seed": seed, "scores": scores, **figures})
        print(f"seed {seed}: {describe(scores)}", flush=True)
    print(f"\n{table([entry['scores'] for entry in runs], task)}\n")
    print(f"{runs[0]['parameters'] / 1e6:.2f} M parameters when merged, {runs[0]['trainable'] / 1e6:.2f} M trained")
    print(f"what was trained with each seed is in {output}, as adapter and as merged model")
    write_json(options, {"task": task.name, "method": options.method, "runs": runs})


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `arguments` in its stead, for tests."""
    model = "Hub id or local path of a model that can classify (default: MiniLM-L6 from a pip package)"
    parser = example_parser(__doc__, model=model, ratio=0.25, steps=STEPS)
    add = parser.add_argument
    add(
        "--dataset",
        help="papers (the default: sentence of a paper -> its role, from a pip package), wordnet, or a Hub id "
        "(owner/name or owner/name:config), file or folder for `datasets`",
    )
    add("--task", choices=list(TASKS), help="a task of GLUE: its metrics and test splits, and its data from the Hub")
    add("--method", choices=METHODS, default="fusion", help="default: %(default)s")
    add("--seeds", type=int, nargs="+", default=[0], help="one run each (default: 0)")
    add("--max-tokens", type=positive, default=128, help="longer inputs are cut (default: %(default)s)")
    add("--max-test", type=positive, help="most examples of a test split, drawn at random (default: all)")
    rates = ", ".join(f"{rate} ({name})" for name, rate in LEARNING_RATES.items())
    add_options(parser, layers="all", batch_size=16, learning_rate=rates)
    options = parse(parser, PAPER_UNDERSTANDING, arguments)
    check_methods([options.method], options)
    if options.smoke:
        options.steps, options.max_test = SMOKE_STEPS, SMOKE_TEST
    return options


def fine_tuned(task: TaskData, options: argparse.Namespace, seed: int, folder: Path) -> tuple[Scores, dict[str, Any]]:
    """One run: a model is made narrow, fine-tuned, tested, saved as `adapter` and `merged` in `folder`."""
    steps = training_steps(options, min(len(task.train), options.max_train or len(task.train)))
    rate = options.learning_rate or LEARNING_RATES["fused" if options.method in FUSED else options.method]
    path = classifier_path(options.model)
    tokenizer = load_tokenizer(path)
    collator = DataCollatorWithPadding(tokenizer)
    wanted = min(steps * options.batch_size, options.max_train or len(task.train))
    train = tokenize(tokenizer, draw(task.train, wanted, seed), options.max_tokens)
    model = prepare(
        load_classifier(path, max(1, len(task.labels)), seed),  # one output: transformers takes it for a regression
        options.method,
        "SEQ_CLS",
        train,
        collator,
        options,
        learning_rate=rate,
        sequences=CALIBRATION_SEQUENCES,
        seed=seed,
    )
    trainer, seconds = fine_tune(
        model,
        train,
        collator,
        title=f"{options.method}, seed {seed}",
        steps=steps,
        batch_size=options.batch_size,
        learning_rate=rate,
        settings={**options.settings, "seed": seed},
    )
    scores = {
        split: test(trainer, tokenize(tokenizer, draw(examples, options.max_test), options.max_tokens), task.metrics)
        for split, examples in task.tests.items()
    }
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if options.method != "full":
        model.save_pretrained(folder / "adapter")  # type: ignore[operator]
    merged = save_merged(model, tokenizer, str(folder / "merged"))
    return scores, {
        "steps": steps,
        "learning_rate": rate,
        "seconds_per_step": seconds,
        "trainable": trainable,
        **merged,
    }


def test(trainer: Trainer, examples: list[dict[str, Any]], metrics: tuple[str, ...]) -> dict[str, float]:
    by_length = sorted(examples, key=lambda example: len(example["input_ids"]))  # less padding
    output = trainer.predict(by_length)
    return measure(metrics, output.predictions, output.label_ids)


def describe(scores: Scores) -> str:
    return "; ".join(
        f"{split} " + ", ".join(f"{metric} {value:.3f}" for metric, value in values.items())
        for split, values in scores.items()
    )


def table(runs: list[Scores], task: TaskData) -> str:
    """Mean and, of several seeds, standard deviation of every metric on every test split."""
    columns = ["metric", *task.tests]
    return text_table(columns, [[m, *(spread([run[s][m] for run in runs]) for s in task.tests)] for m in task.metrics])


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


if __name__ == "__main__":
    run(main)
