"""Labelled tasks: splits, columns, labels."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.fixture
def tasks(example) -> ModuleType:
    return example("common.text_tasks")


def test_validation_takes_examples_from_training_and_none_from_the_test(tasks):
    train, test = ([(f"{split} {i}", None, i % 2) for i in range(40)] for split in ("train", "test"))
    task = tasks.TextClassification("t", ["a", "b"], train, test)
    chosen_by = task.validation()
    assert len(chosen_by.test) == 4 and sorted(chosen_by.train + chosen_by.test) == sorted(train)


def test_task_from_pairs(tasks):
    task = tasks.from_pairs("t", [("a", "y"), ("b", "x"), ("c", "y")], [("d", "x"), ("e", "y"), ("f", "unseen")])
    assert task.labels == ["x", "y"]
    assert task.train == [("a", None, 1), ("b", None, 0), ("c", None, 1)]
    assert task.test == [("d", None, 0), ("e", None, 1)]  # what training never named cannot be asked for
    assert task.majority() == 0.5


def test_sample_is_repeatable_and_bounded(tasks):
    pairs = [(str(i), "ab"[i % 2]) for i in range(100)]
    task = tasks.from_pairs("t", pairs, pairs)
    assert task.sample(10, 5) == task.sample(10, 5)
    assert [len(part) for part in (task.sample(10, 5).train, task.sample(10, 5).test)] == [10, 5]
    assert sorted(task.sample(None, 1000).test) == sorted(task.test)


def dataset_dict(**splits):
    datasets = pytest.importorskip("datasets")
    return datasets.DatasetDict({name: datasets.Dataset.from_dict(rows) for name, rows in splits.items()})


def test_columns_are_found_by_usual_name(tasks):
    splits = dataset_dict(
        train={"id": ["1", "2"], "sentence": ["a", "b"], "label": [1, 0]},
        test={"id": ["3"], "sentence": ["c"], "label": [-1]},
        validation={"id": ["4"], "sentence": ["d"], "label": [1]},
    )
    task = tasks.from_columns("t", splits)
    assert task.train == [("a", None, 1), ("b", None, 0)]
    assert task.test == [("d", None, 1)]  # the test set is unlabelled


def test_pairs_and_named_classes(tasks):
    datasets = pytest.importorskip("datasets")
    rows = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "verdict": ["no", "yes"]}
    splits = dataset_dict(train=rows, test=rows)
    for name in splits:
        splits[name] = splits[name].cast_column("verdict", datasets.ClassLabel(names=["yes", "maybe", "no"]))
    task = tasks.from_columns("t", splits)
    assert task.labels == ["yes", "maybe", "no"]
    assert task.train == [("a", "c", 2), ("b", "d", 0)]


def test_a_fifth_is_held_out_where_there_is_no_test_split(tasks):
    task = tasks.from_columns("t", dataset_dict(train={"text": list("abcdefghij"), "label": ["x", "y"] * 5}))
    assert (len(task.train), len(task.test)) == (8, 2)
    assert {text for text, *_ in task.train + task.test} == set("abcdefghij")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"one": ["a"], "two": ["b"], "label": [1]}, "no text column.*expected one of text"),
        ({"text": ["a"], "stars": [1]}, "no label column.*expected one of label"),
        ({"text": ["a"], "label": [0.5]}, "`label`.*one class per example"),
        ({"text": ["a"], "label": [[0, 1]]}, "`label`.*one class per example"),
    ],
)
def test_unclear_columns_are_refused(tasks, rows, message):
    with pytest.raises(ValueError, match=message):
        tasks.from_columns("t", dataset_dict(train=rows, test=rows))


def test_csv_file_by_path(tasks, tmp_path):
    pytest.importorskip("datasets")
    path = tmp_path / "mail.csv"
    path.write_text("text,label\n" + "good,ham\nbad,spam\n" * 10)
    task = tasks.load_text_classification(str(path))
    assert task.labels == ["ham", "spam"]
    assert len(task.train + task.test) == 20
