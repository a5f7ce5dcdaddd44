"""GLUE's tasks and any like them: their examples, their test splits, their metrics."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr  # type: ignore[import-untyped]
from sklearn.metrics import f1_score, matthews_corrcoef  # type: ignore[import-untyped]

from . import hub_datasets as hub
from .errors import InputError
from .text_tasks import Example, column_reader, load_text_classification

HUB_ID = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """What GLUE says about one of its tasks.

    Args:
        metrics: names in `METRICS`.
        classes: how many there are; 0: a regression.
        tests: the splits that are reported, as the test sets' labels are not public.
    """

    metrics: tuple[str, ...]
    classes: int = 2
    tests: tuple[str, ...] = ("validation",)


TASKS = {
    "cola": Task(("matthews",)),
    "sst2": Task(("accuracy",)),
    "mrpc": Task(("f1", "accuracy")),
    "stsb": Task(("pearson", "spearman"), classes=0),
    "qqp": Task(("f1", "accuracy")),
    "mnli": Task(("accuracy",), classes=3, tests=("validation_matched", "validation_mismatched")),
    "qnli": Task(("accuracy",)),
    "rte": Task(("accuracy",)),
    "wnli": Task(("accuracy",)),
}
CLASSIFICATION, REGRESSION = ("accuracy", "macro_f1"), ("pearson", "spearman")  # of data sets that are not GLUE's


@dataclass(frozen=True)
class TaskData:
    """Examples to train on and one list of test examples a split; `labels` is empty in a regression."""

    name: str
    metrics: tuple[str, ...]
    labels: list[str]
    train: list[Example]
    tests: dict[str, list[Example]]


def load_task(dataset: str | None, task: str | None) -> TaskData:
    """A task's examples.

    Args:
        dataset: "papers", "wordnet", or a Hub id or local path for `datasets`; None: GLUE's own on the Hub if there
            is a `task`, else "papers".
        task: a key of `TASKS`, for its metrics and test splits; None: by the labels' type.

    Raises:
        InputError: no such data set, its columns cannot be told, or its labels are not the task's.
    """
    name = dataset or (f"{HUB_ID}:{task}" if task else "papers")
    if name in ("papers", "wordnet"):
        if task:
            raise InputError(f"--dataset {name} is a task of its own: leave --task {task} out")
        known = load_text_classification(name)
        return TaskData(name, CLASSIFICATION, known.labels, known.train, {"test": known.test})
    return from_splits(name, hub.load(name), task)


def from_splits(name: str, splits: Any, task: str | None) -> TaskData:
    """A task from a `DatasetDict`; its test splits are GLUE's where it has them, else the usual one."""
    train, tests = _splits(name, splits, TASKS[task].tests if task else ())
    column = hub.label_column(name, train.features, scores=True)
    regression = TASKS[task].classes == 0 if task else hub.is_score(train.features[column])
    labels, read = column_reader(name, train, regression)
    if task and len(labels) != TASKS[task].classes:
        raise InputError(
            f"`{name}` has the labels {labels}, but {task} has {TASKS[task].classes} classes: "
            "give the data set of this task, or leave --task out"
        )
    metrics = TASKS[task].metrics if task else REGRESSION if regression else CLASSIFICATION
    return TaskData(name, metrics, labels, read(train), {split: read(rows) for split, rows in tests.items()})


def _splits(name: str, splits: Any, wanted: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    if wanted and "train" in splits and all(split in splits for split in wanted):
        return splits["train"], {split: splits[split] for split in wanted}
    train, test = hub.train_and_test(name, splits)
    return train, {"test": test}


def measure(metrics: tuple[str, ...], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of a classifier's or regressor's outputs.

    Args:
        metrics: names in `METRICS`.
        logits: outputs of shape (examples, labels), of a regression (examples, 1).
        labels: indices of classes, or scores, of shape (examples,).
    """
    predictions = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(-1)
    return {name: METRICS[name](predictions, labels) for name in metrics}


def _correlation(function: Callable[..., Any]) -> Callable[[np.ndarray, np.ndarray], float]:
    """A correlation that is 0, not undefined, where all predictions are the same."""

    def correlation(predictions: np.ndarray, labels: np.ndarray) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about constant input
            return float(np.nan_to_num(function(predictions, labels).statistic))

    return correlation


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda predictions, labels: float((predictions == labels).mean()),
    "f1": lambda predictions, labels: float(f1_score(labels, predictions, zero_division=0)),  # of class 1
    "macro_f1": lambda predictions, labels: float(f1_score(labels, predictions, average="macro", zero_division=0)),
    "matthews": lambda predictions, labels: float(matthews_corrcoef(labels, predictions)),
    "pearson": _correlation(pearsonr),
    "spearman": _correlation(spearmanr),
}
