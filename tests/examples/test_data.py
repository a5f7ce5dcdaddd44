"""The pure helpers of the examples: what they read, find, refuse and measure."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def data(example) -> ModuleType:
    return example("data")


@pytest.fixture
def hub(example) -> ModuleType:
    return example("hub")


@pytest.fixture
def papers(example) -> ModuleType:
    return example("papers")


def test_validation_takes_examples_from_training_and_none_from_the_test(example):
    train, test = ([(f"{split} {i}", None, i % 2) for i in range(40)] for split in ("train", "test"))
    task = example("data").TextClassification("t", ["a", "b"], train, test)
    chosen_by = task.validation()
    assert len(chosen_by.test) == 4 and sorted(chosen_by.train + chosen_by.test) == sorted(train)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf"])
def test_a_rate_that_cannot_train_is_refused(example, text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number above 0"):
        example("arguments").rate(text)


# --- papers


def paper(name: str, sentences: list[str], **marked: list[int]) -> dict:
    """A record with one section, in which the given sentences are marked."""
    highlights = {
        role: {"abstract": [int(i in marked.get(role, [])) for i in range(len(sentences))]}
        for role in ("challenge", "approach", "outcome")
    }
    return {"id": name, "sentences": {"abstract": sentences}, "highlights": highlights}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny copy of the package's data: one paper a split, its sentences named after it."""
    (tmp_path / "paper_jsons").mkdir()
    for name in ("train", "val", "test"):
        record = paper(name, [f"{name} {i}" for i in range(7)], challenge=[0], approach=[1, 2], outcome=[3])
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
        body = {"body_text": [{"text": f"{name} text"}, {"text": "goes on"}]}
        (tmp_path / "paper_jsons" / f"{name}.json").write_text(json.dumps({"pdf_parse": body}))
    return tmp_path


def test_roles_of_sentences(papers):
    record = paper("p", ["a", "b", "c", "d"], challenge=[1], approach=[2, 3], outcome=[3])
    assert list(papers.sentences_with_role(record)) == [("a", "none"), ("b", "challenge"), ("c", "approach")]


def test_role_task_is_balanced_and_repeatable(papers, folder):
    task = papers.role_task("train", folder)
    assert Counter(role for _, role in task) == {"approach": 4, "challenge": 2, "outcome": 2, "none": 4}
    assert task == papers.role_task("train", folder)


def test_no_paper_is_in_both_splits(papers, folder):
    names = [{sentence.split()[0] for sentence, _ in papers.role_task(split, folder)} for split in ("train", "test")]
    assert names == [{"train", "val"}, {"test"}]
    assert papers.paper_texts("train", folder) == ["train text\ngoes on", "val text\ngoes on"]
    assert papers.paper_texts("test", folder) == ["test text\ngoes on"]


# --- tasks


def test_wordnet_lines(data):
    lines = [
        "  1 This software and database is being provided",
        '00001740 03 n 01 entity 0 000 | that which is perceived; "an example; of it"; "more"  ',
        "00002137 07 n 02 flat_coat 0 sheen 0 000 | a coat | or two; shiny  ",
    ]
    assert data.parse_wordnet(lines) == [("that which is perceived", "03"), ("a coat | or two; shiny", "07")]


def test_task_from_pairs(data):
    task = data.from_pairs("t", [("a", "y"), ("b", "x"), ("c", "y")], [("d", "x"), ("e", "y"), ("f", "unseen")])
    assert task.labels == ["x", "y"]
    assert task.train == [("a", None, 1), ("b", None, 0), ("c", None, 1)]
    assert task.test == [("d", None, 0), ("e", None, 1)]  # what training never named cannot be asked for
    assert task.majority() == 0.5


def test_sample_is_repeatable_and_bounded(data):
    pairs = [(str(i), "ab"[i % 2]) for i in range(100)]
    task = data.from_pairs("t", pairs, pairs)
    assert task.sample(10, 5) == task.sample(10, 5)
    assert [len(part) for part in (task.sample(10, 5).train, task.sample(10, 5).test)] == [10, 5]
    assert sorted(task.sample(None, 1000).test) == sorted(task.test)


def test_text_file_holds_out_its_end(data, tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("0123456789" * 10)
    assert data.load_texts(str(path)) == (["0123456789" * 9], ["0123456789"])


@pytest.mark.parametrize("name", ["data.noun", "somewhere/data.noun"])
def test_missing_wordnet_says_where_it_comes_from(data, tmp_path, name):
    with pytest.raises(ValueError, match="wordnet-base"):
        data.load_text_classification(str(tmp_path / name))


def test_missing_package_says_how_to_install_it(example):
    with pytest.raises(ValueError, match=r"pip install --no-deps .*no-such-package==1\.0"):
        example("packages").package_folder("no_such_package", "no-such-package==1.0")


# --- data sets of the `datasets` library


def dataset_dict(**splits):
    datasets = pytest.importorskip("datasets")
    return datasets.DatasetDict({name: datasets.Dataset.from_dict(rows) for name, rows in splits.items()})


def test_columns_are_found_by_usual_name(data):
    splits = dataset_dict(
        train={"id": ["1", "2"], "sentence": ["a", "b"], "label": [1, 0]},
        test={"id": ["3"], "sentence": ["c"], "label": [-1]},
        validation={"id": ["4"], "sentence": ["d"], "label": [1]},
    )
    task = data.from_columns("t", splits)
    assert task.train == [("a", None, 1), ("b", None, 0)]
    assert task.test == [("d", None, 1)]  # the test set is unlabelled


def test_pairs_and_named_classes(data):
    datasets = pytest.importorskip("datasets")
    rows = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "verdict": ["no", "yes"]}
    splits = dataset_dict(train=rows, test=rows)
    for name in splits:
        splits[name] = splits[name].cast_column("verdict", datasets.ClassLabel(names=["yes", "maybe", "no"]))
    task = data.from_columns("t", splits)
    assert task.labels == ["yes", "maybe", "no"]
    assert task.train == [("a", "c", 2), ("b", "d", 0)]


def test_a_fifth_is_held_out_where_there_is_no_test_split(data):
    task = data.from_columns("t", dataset_dict(train={"text": list("abcdefghij"), "label": ["x", "y"] * 5}))
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
def test_unclear_columns_are_refused(data, rows, message):
    with pytest.raises(ValueError, match=message):
        data.from_columns("t", dataset_dict(train=rows, test=rows))


def test_no_training_split(hub):
    with pytest.raises(ValueError, match="no split `train`; it has test"):
        hub.train_and_test("t", dataset_dict(test={"text": ["a"]}))


def test_csv_file_by_path(data, tmp_path):
    pytest.importorskip("datasets")
    path = tmp_path / "mail.csv"
    path.write_text("text,label\n" + "good,ham\nbad,spam\n" * 10)
    task = data.load_text_classification(str(path))
    assert task.labels == ["ham", "spam"]
    assert len(task.train + task.test) == 20


# --- arguments and measurements


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("last-half", [2, 3, 4]),
        ("last-two-thirds", [1, 2, 3, 4]),
        ("1,3-4", [1, 3, 4]),
        ("0", [0]),
    ],
)
def test_layer_indices(example, text, layers):
    assert example("arguments").layer_indices(text, 5) == layers


@pytest.mark.parametrize("text", ["5", "3-7", "x", "", "-1", "4-2"])
def test_wrong_layers_are_refused(example, text):
    with pytest.raises(ValueError, match="--layers"):
        example("arguments").layer_indices(text, 5)


def test_text_table(example):
    table = example("measure").text_table(["name", "x"], [["a", "1.25"], ["longer", "2"]])
    assert table.splitlines() == ["name       x", "------  ----", "a       1.25", "longer     2"]


def test_folder_size(example, tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_bytes(b"x" * 5000)
    assert example("measure").folder_size(tmp_path) == pytest.approx(0.005)


def test_peak_memory_is_the_processs_own():
    """A small process started by a big one: what the parent held does not count."""
    report = "import sys; sys.path.insert(0, sys.argv[1]); import measure; print(measure.peak_memory())"
    hold = "held = b'x' * 300_000_000; "
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {report!r}, sys.argv[1]])"

    def peak(code: str) -> float:
        return float(subprocess.check_output([sys.executable, "-c", code, str(EXAMPLES)]))

    alone = peak(report)
    assert peak(hold + start) < alone + 100
    assert peak(hold + report) > alone + 290
