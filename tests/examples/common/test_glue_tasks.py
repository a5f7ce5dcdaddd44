"""GLUE's tasks: test splits, labels, metrics."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest


@pytest.fixture
def glue_tasks(example) -> ModuleType:
    pytest.importorskip("sklearn")
    return example("common.glue_tasks")


def splits(**rows):
    datasets = pytest.importorskip("datasets")
    return datasets.DatasetDict({name: datasets.Dataset.from_dict(columns) for name, columns in rows.items()})


def premises(*labels: int) -> dict[str, list]:
    return {"premise": ["p"] * len(labels), "hypothesis": list("abcdef"[: len(labels)]), "label": list(labels)}


def test_mnli_has_two_test_splits(glue_tasks):
    mnli = splits(
        train=premises(0, 1, 2),
        validation_matched=premises(2, 0),
        validation_mismatched=premises(1),
        test_matched=premises(-1),
    )
    task = glue_tasks.from_splits("mnli", mnli, "mnli")
    assert task.tests == {
        "validation_matched": [("p", "a", 2), ("p", "b", 0)],
        "validation_mismatched": [("p", "a", 1)],
    }
    assert len(task.labels) == 3


def test_stsb_is_a_regression(glue_tasks):
    rows = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [5.0, 1.25]}
    task = glue_tasks.from_splits("stsb", splits(train=rows, validation=rows), "stsb")
    assert (task.labels, task.metrics) == ([], ("pearson", "spearman"))
    assert task.tests["validation"] == [("a", "c", 5.0), ("b", "d", 1.25)]


@pytest.mark.parametrize(
    ("labels", "metrics", "classes"),
    [([0.5, 1.5, 2.0], ("pearson", "spearman"), 0), (["x", "y", "x"], ("accuracy", "macro_f1"), 2)],
)
def test_tasks_beyond_glue_by_their_labels(glue_tasks, labels, metrics, classes):
    rows = {"text": ["a", "b", "c"], "label": labels}
    task = glue_tasks.from_splits("mine", splits(train=rows, test=rows), None)
    assert (task.metrics, len(task.labels), list(task.tests)) == (metrics, classes, ["test"])


def test_whole_numbers_as_scores(glue_tasks):
    rows = {"sentence1": ["a"], "sentence2": ["b"], "score": [3]}
    task = glue_tasks.from_splits("mine", splits(train=rows, test=rows), "stsb")
    assert task.train == [("a", "b", 3.0)]
    assert isinstance(task.train[0][2], float)  # an integer label would be taken for a class


def test_labels_that_are_not_the_tasks(glue_tasks):
    with pytest.raises(ValueError, match="cola has 2 classes"):
        glue_tasks.from_splits("mine", splits(train=premises(0, 1, 2), validation=premises(0)), "cola")


def test_the_default_task_is_no_task_of_glue(glue_tasks):
    with pytest.raises(ValueError, match="leave --task mnli out"):
        glue_tasks.load_task("papers", "mnli")


def test_every_metric_is_known(glue_tasks):
    named = {metric for task in glue_tasks.TASKS.values() for metric in task.metrics}
    named |= {*glue_tasks.CLASSIFICATION, *glue_tasks.REGRESSION}
    assert named == set(glue_tasks.METRICS)


def test_metrics_of_classes(glue_tasks):
    """Predicted 1 1 0 0 of the truth 1 0 0 0: one true positive, one false."""
    logits = np.array([[0, 1], [-1, 3], [2, 1], [1, 0]])
    found = glue_tasks.measure(("accuracy", "f1", "macro_f1", "matthews"), logits, np.array([1, 0, 0, 0]))
    expected = {"accuracy": 3 / 4, "f1": 2 / 3, "macro_f1": (2 / 3 + 4 / 5) / 2, "matthews": 1 / 3**0.5}
    assert found == pytest.approx(expected)


def test_metrics_of_scores(glue_tasks):
    scores = np.array([0.0, 1.0, 2.0, 3.0])
    found = glue_tasks.measure(("pearson", "spearman"), np.exp(scores)[:, None], scores)
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] == pytest.approx(np.corrcoef(np.exp(scores), scores)[0, 1])


def test_constant_scores_correlate_with_nothing(glue_tasks):
    found = glue_tasks.measure(("pearson", "spearman"), np.ones((3, 1)), np.array([1.0, 2.0, 3.0]))
    assert found == {"pearson": 0, "spearman": 0}
