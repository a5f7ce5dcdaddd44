"""Shrink a classifier after it was fine-tuned: calibrate, fuse, distil for minutes; no label is used.

    python examples/shrink.py                         MiniLM-L6 on sentences of papers, 3 seeds; 20 minutes on 2 cores
    python examples/shrink.py --seeds 0 --allocation uniform --ratio 0.5
    python examples/shrink.py --model roberta-base --dataset nyu-mll/glue:sst2 --lora
    python examples/shrink.py --smoke                 the same path in a minute; its figures mean nothing

The setting of Kwon et al. (2022): somebody has a model that does its task, fine-tuned in full (or by LoRA, merged), and
wants it smaller. Rows, all of one model a seed: the model itself; its narrow form; that distilled from the model
itself; and, beside them, what the same narrow FFNs reach when they and the head are fine-tuned on the labels instead,
from the pretrained model, in as many steps as the full model was.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from common.classifiers import accuracy, tokenize
from common.command_line import example_parser, positive, rate, run, write_json
from common.fine_tuning import be_quiet, fine_tune
from common.load_models import classifier_path, load_classifier, load_tokenizer
from common.reporting import text_table
from common.text_tasks import load_text_classification
from common.trainable_parts import head, with_lora
from peft import PeftModel, get_peft_model
from transformers import DataCollatorWithPadding, PreTrainedModel, Trainer, TrainingArguments, set_seed

from peft_fusion import FusionConfig, calibrate, distill

BATCH = 32
RATES = {"task": 2e-4, "lora": 1e-3, "distilled": 5e-5}  # "task": of MiniLM in full and narrow, the best of four
CALIBRATION_SEQUENCES = 512
Figures = dict[str, float]


def main() -> None:
    options = parse_arguments()
    be_quiet()
    runs = [Shrinking(options, seed).figures() for seed in options.seeds]
    rows = [[name, *summary([run[name] for run in runs], [run["full"] for run in runs])] for name in runs[0]]
    print("\n" + text_table(["", "accuracy", "spread", "points from full", "seconds"], rows))
    write_json(options, {"seeds": options.seeds, "runs": runs})


def parse_arguments() -> argparse.Namespace:
    model = "Hub id or local path of an encoder (default: MiniLM-L6 from a pip package)"
    parser = example_parser(__doc__, model=model, ratio=0.25, steps=450)
    add = parser.add_argument
    add("--dataset", default="papers", help="papers (default), wordnet, Hub id or local path")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    add("--allocation", choices=("uniform", "fisher"), default="fisher", help="of the neurons (default: %(default)s)")
    refit = "of the fine-tuned model's out-projections; some models' layers allow ridge alone (default: %(default)s)"
    add("--refit", choices=("ridge", "sequential"), default="sequential", help=refit)
    add("--epochs", type=positive, default=8, help="of the distillation, over the training sentences, without labels")
    add("--learning-rate", type=rate, default=RATES["distilled"], help="of the distillation (default: %(default)s)")
    add("--task-rate", type=rate, default=RATES["task"], help="of fine-tuning, but by LoRA (default: %(default)s)")
    add("--lora", action="store_true", help="the model is fine-tuned by LoRA, which is then merged")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.epochs, options.seeds = 3, 1, options.seeds[:1]
    return options


class Shrinking:
    """One seed: the models, one after another, and what each of them reaches.

    Args:
        options: the command line's.
        seed: of the head, the order of the examples, the fusion and the distillation.
    """

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed, small = options, seed, options.smoke
        self.task = load_text_classification(options.dataset).sample(64 if small else None, 32 if small else None, seed)
        self.path = classifier_path(options.model)
        self.tokenizer = load_tokenizer(self.path)
        self.train, self.test = (tokenize(self.tokenizer, part) for part in (self.task.train, self.task.test))
        self.collator = DataCollatorWithPadding(self.tokenizer)
        unlabelled = [{name: ids for name, ids in example.items() if name != "labels"} for example in self.train]
        self.batches = [self.collator(unlabelled[i : i + BATCH]) for i in range(0, len(unlabelled), BATCH)]

    def figures(self) -> dict[str, Figures]:
        """Row -> accuracy and seconds."""
        rows: dict[str, Figures] = {}
        self.check_refit()
        full, rows["full"] = self.timed("full", self.fine_tuned)
        narrow, rows["narrow"] = self.timed("narrow", lambda: self.narrow(full))
        for name, make in (
            ("narrow, distilled", lambda: self.distilled(narrow)),
            ("narrow, trained on the task instead", self.trained_narrow),
        ):
            _, rows[name] = self.timed(name, make)
        return rows

    def timed(self, name: str, make: Callable[[], Any]) -> tuple[Any, Figures]:
        """Makes a model, and tests it."""
        set_seed(self.seed)
        started = time.perf_counter()
        model = make()
        seconds = time.perf_counter() - started
        arguments = TrainingArguments(
            tempfile.gettempdir(), report_to="none", disable_tqdm=True, label_names=["labels"]
        )
        found = accuracy(Trainer(model, arguments, data_collator=self.collator), self.test)
        print(f"seed {self.seed}, {name}: {found:.4f} in {seconds:.0f} s", flush=True)
        return model, {"accuracy": found, "seconds": seconds}

    def check_refit(self) -> None:
        """Has a model whose layers do not allow the refit refused before it is fine-tuned; one FFN tells."""
        model = load_classifier(self.path, len(self.task.labels), self.seed)
        config = FusionConfig(ratio=self.options.ratio, refit=self.options.refit, layers_to_transform=0)
        calibrate(model, config, self.batches[:1], sequences=4)

    def fine_tuned(self) -> PreTrainedModel:
        """The model that somebody has."""
        model = load_classifier(self.path, len(self.task.labels), self.seed)
        trained = with_lora(model, "SEQ_CLS") if self.options.lora else model
        self.fit(trained, "full", RATES["lora"] if self.options.lora else self.options.task_rate)
        return trained.merge_and_unload() if isinstance(trained, PeftModel) else model

    def narrow(self, full: PreTrainedModel) -> PeftModel:
        """Its narrow form; the head is the trained one, and stays what it is."""
        model, config = copy.deepcopy(full), self.config(refit=self.options.refit)
        calibrate(model, config, self.batches, sequences=CALIBRATION_SEQUENCES)
        return get_peft_model(model, config)

    def distilled(self, narrow: PeftModel) -> PeftModel:
        """The same, having learnt what the full model predicts of the training sentences."""
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                num_train_epochs=self.options.epochs,
                per_device_train_batch_size=BATCH,
                learning_rate=self.options.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                eval_strategy="epoch",
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=self.seed,
            )
            found = distill(narrow, self.batches, outputs="logits", args=arguments)  # the head is trained
        print(f"distilled {found.outputs}: {found.before:.4f} -> {found.after:.4f} on held-out sentences", flush=True)
        return narrow

    def trained_narrow(self) -> PeftModel:
        """Narrow FFNs of the pretrained model, fine-tuned with the head on the labels."""
        model = load_classifier(self.path, len(self.task.labels), self.seed)
        config = self.config(task_type="SEQ_CLS", modules_to_save=head(model))
        calibrate(model, config, self.batches, sequences=CALIBRATION_SEQUENCES)
        trained = get_peft_model(model, config)
        self.fit(trained, "narrow", self.options.task_rate)
        return trained

    def config(self, **settings: Any) -> FusionConfig:
        options = self.options
        return FusionConfig(ratio=options.ratio, allocation=options.allocation, seed=self.seed, **settings)

    def fit(self, model: torch.nn.Module, title: str, learning_rate: float) -> None:
        fine_tune(
            model,
            self.train,
            self.collator,
            title=title,
            steps=self.options.steps,
            batch_size=BATCH,
            learning_rate=learning_rate,
            settings={"seed": self.seed},
        )


def summary(rows: list[Figures], full: list[Figures]) -> list[str]:
    """Of one row over the seeds: mean accuracy, its standard deviation, its distance from the full model's, seconds."""
    accuracies = [row["accuracy"] for row in rows]
    points = [100 * (row["accuracy"] - original["accuracy"]) for row, original in zip(rows, full, strict=True)]
    spread = f"{statistics.stdev(accuracies):.4f}" if rows[1:] else "-"
    seconds = statistics.mean(row["seconds"] for row in rows)
    return [f"{statistics.mean(accuracies):.4f}", spread, f"{statistics.mean(points):+.2f}", f"{seconds:.0f}"]


if __name__ == "__main__":
    run(main)
