"""One row of the quickstart's table: a method trains a classifier. Run by quickstart.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data import Example, TextClassification, load_text_classification
from measure import folder_size, peak_memory, serve
from methods import METHODS
from models import classifier_path, load_classifier, load_tokenizer, logits
from peft import PeftModel
from torch.utils.data import DataLoader
from training import be_quiet, fine_tune
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase, Trainer

BATCH_SIZE = 16
MAX_TOKENS = 64
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
        method: a key of `methods.METHODS`.
        model: Hub id or local path; None: the default MiniLM.
        dataset: see `data.load_text_classification`.
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
    return row | merge(trained, tokenizer, f"{folder}/merged")


def tokenize(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> list[dict[str, Any]]:
    """Examples as token ids and label."""
    return [
        {**tokenizer(text, pair, truncation=True, max_length=MAX_TOKENS), "labels": label}
        for text, pair, label in examples
    ]


def accuracy(trainer: Trainer, test: list[dict[str, Any]]) -> float:
    by_length = sorted(test, key=lambda example: len(example["input_ids"]))  # less padding
    output = trainer.predict(by_length)
    return float((output.predictions.argmax(-1) == output.label_ids).mean())


def save_reference(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TextClassification,
    folder: str,
) -> None:
    """Logits of some test examples, against which reload.py compares."""
    inputs = [[text, pair] for text, pair, _ in task.test[:REFERENCE_TEXTS]]
    reference = {"inputs": inputs, "logits": logits(model, tokenizer, inputs).tolist()}
    Path(folder, "reference.json").write_text(json.dumps(reference), encoding="utf-8")


def merge(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: str) -> dict[str, Any]:
    """Saves what remains when the adapter is merged: a plain model, and the parameters it costs to run."""
    plain = model.merge_and_unload() if isinstance(model, PeftModel) else model
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"parameters": sum(p.numel() for p in plain.parameters()), "merged_mb": folder_size(folder)}


if __name__ == "__main__":
    serve(train_row)
