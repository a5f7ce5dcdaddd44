"""One row of the quickstart's table: a method trains a classifier. quickstart.py calls it in a fresh process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from .classifiers import accuracy, logits, save_merged, tokenize
from .fine_tuning import be_quiet, fine_tune
from .load_models import classifier_path, load_classifier, load_tokenizer
from .quickstart_methods import METHODS
from .reporting import folder_size, peak_memory
from .text_tasks import TextClassification, load_text_classification

BATCH_SIZE = 16
REFERENCE_TEXTS = 32


def train_row(
    method: str,
    model: str | None,
    dataset: str,
    ratio: float,
    steps: int,
    max_test: int,
    folder: str,
    learning_rate: float | None = None,
    validation: bool = False,
) -> dict[str, Any]:
    """Trains, measures and saves.

    Args:
        method: a key of `quickstart_methods.METHODS`.
        model: Hub id or local path; None: the default MiniLM.
        dataset: see `text_tasks.load_text_classification`.
        ratio: fraction of each FFN's neurons that fusion keeps.
        steps: training steps.
        max_test: most test examples, drawn at random.
        learning_rate: None: the method's own.
        validation: measure on examples held out of the training split, and not on the test split.
        folder: gets `saved` (model or adapter), `merged` (plain model) and `reference.json` (texts, logits).

    Returns:
        The row of the table, by column.
    """
    be_quiet()
    task = load_text_classification(dataset)
    task = (task.validation() if validation else task).sample(train=steps * BATCH_SIZE, test=max_test)
    path = classifier_path(model)
    tokenizer = load_tokenizer(path)
    train, collator = tokenize(tokenizer, task.train), DataCollatorWithPadding(tokenizer)
    batches: DataLoader = DataLoader(train, BATCH_SIZE, collate_fn=collator)  # type: ignore[arg-type]
    trained = METHODS[method].prepare(load_classifier(path, len(task.labels)), ratio, batches)
    trainer, seconds = fine_tune(
        trained,
        train,
        collator,
        title=method,
        steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=METHODS[method].learning_rate if learning_rate is None else learning_rate,
    )
    memory = peak_memory()
    score = accuracy(trainer, tokenize(tokenizer, task.test))
    trained.save_pretrained(f"{folder}/saved")
    row = {
        "method": method,
        "trainable_parameters": sum(p.numel() for p in trained.parameters() if p.requires_grad),
        "seconds_per_step": seconds,
        "peak_memory_mb": memory,
        "accuracy": score,
        "majority_accuracy": task.majority(),
        "test_examples": len(task.test),
        "saved_mb": folder_size(f"{folder}/saved"),
    }
    save_reference(trained, tokenizer, task, folder)
    return row | save_merged(trained, tokenizer, f"{folder}/merged")


def save_reference(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TextClassification,
    folder: str,
) -> None:
    """Logits of some test examples, against which quickstart_reload.py compares."""
    inputs = [[text, pair] for text, pair, _ in task.test[:REFERENCE_TEXTS]]
    reference = {"inputs": inputs, "logits": logits(model, tokenizer, inputs).tolist()}
    Path(folder, "reference.json").write_text(json.dumps(reference), encoding="utf-8")
