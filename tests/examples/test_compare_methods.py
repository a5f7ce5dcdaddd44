"""compare_methods.py: the grid, what is resumed, the table."""

from __future__ import annotations

import csv
import json

import pytest
from transformers import TrainingArguments


@pytest.fixture
def compare(example):
    return example("compare_methods")


def runs() -> list[dict]:
    figures = {"seconds a step": 0.5, "Adam-NTK error": 0.25, "majority": 0.375}
    return [
        {"method": "fusion", "ratio": 0.25, "seed": 0, "accuracy": 0.5, **figures},
        {"method": "full", "ratio": 1.0, "seed": 0, "accuracy": 0.75, "seconds a step": 1.5},
        {"method": "fusion", "ratio": 0.25, "seed": 1, "accuracy": 0.7, "seconds a step": 0.7},
        {"method": "fusion", "ratio": 0.5, "seed": 0, "accuracy": 0.6, **figures},
    ]


def test_the_grid_runs_what_has_no_width_once(compare):
    options = compare.parse_arguments(["--methods", "full", "fusion", "--ratios", ".5", ".25", "--seeds", "3", "4"])
    expected = [("full", 1.0, 3), ("fusion", 0.5, 3), ("fusion", 0.25, 3)]
    assert compare.grid(options) == expected + [(name, ratio, 4) for name, ratio, _ in expected]


def test_the_grid_has_every_method_by_default(compare):
    options = compare.parse_arguments([])
    assert {name for name, *_ in compare.grid(options)} == set(compare.METHODS)
    methods = {m.settings.get("method", "fusion") for m in compare.METHODS.values() if m.settings is not None}
    assert methods == {"fusion", "clustering", "sketch", "mmd", "svd", "pruning"}


def test_the_papers_preset(compare):
    options = compare.parse_arguments(["--preset", "paper", "--learning-rate", "5e-5", "--seeds", "3", "0"])
    assert (options.layers, options.ratios, options.learning_rate) == ("last-two-thirds", [0.25], 5e-5)
    setting = compare.setting(options)
    assert (setting.steps, setting.epochs, setting.compared_seed) == (None, 10, 3)
    arguments = TrainingArguments(output_dir="unused", **setting.training)  # takes them
    assert arguments.adam_beta2 == 0.98 and arguments.lr_scheduler_type == "polynomial"
    assert compare.setting(compare.parse_arguments(["--preset", "paper", "--steps", "7"])).steps == 7


def test_runs_of_another_setting_are_refused(compare, example, tmp_path, monkeypatch):
    def run(*arguments):
        compare.main(["--results", str(tmp_path), "--methods", "full", "--seeds", "0", *arguments])

    monkeypatch.setattr(compare, "compare", lambda *_: {"accuracy": 0.5})
    run("--steps", "7")
    before = (tmp_path / "runs.jsonl").read_text()
    with pytest.raises(example("common.errors").InputError, match="have steps 7, not 8: give another folder"):
        run("--steps", "8", "--seeds", "1")
    assert (tmp_path / "runs.jsonl").read_text() == before
    run("--steps", "7", "--seeds", "1")
    assert len(compare.read(tmp_path / "runs.jsonl")) == 2


def test_rows_are_means_over_seeds(compare):
    full, half, quarter = compare.summarize(runs())
    assert [row["ratio"] for row in (full, half, quarter)] == [1.0, 0.5, 0.25]
    assert quarter["accuracy"] == pytest.approx(0.6) and quarter["sd"] == pytest.approx(0.02**0.5)
    assert quarter["seconds a step"] == pytest.approx(0.6) and quarter["seeds"] == 2
    assert quarter["Adam-NTK error"] == 0.25  # of the one seed that has it
    assert full["sd"] is None and "Adam-NTK error" not in full


def test_the_table_as_markdown_csv_and_plot(compare, tmp_path):
    rows = compare.summarize(runs())
    lines = compare.markdown(rows).splitlines()
    assert lines[0] == "| method | ratio | seeds | accuracy | sd | seconds a step | Adam-NTK error |"
    assert lines[2] == "| full | 1 | 1 | .750 |  | 1.5 |  |"
    assert lines[4] == "| fusion | .250 | 2 | .600 | .141 | .600 | .250 |"
    compare.write_csv(rows, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["method"] for row in read] == ["full", "fusion", "fusion"] and read[0]["Adam-NTK error"] == ""
    assert read[1]["majority"] == "0.375"
    compare.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_run_again(compare, tmp_path, monkeypatch):
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(done) + "\n" for done in runs()))
    asked = []

    def run(name, ratio, seed, setting):
        asked.append((name, ratio, seed))
        return {"accuracy": 0.5}

    monkeypatch.setattr(compare, "compare", run)
    arguments = ["--results", str(tmp_path), "--methods", "full", "fusion", "--seeds", "0", "1"]
    compare.main(arguments)
    assert asked == [("full", 1.0, 1)]
    compare.main(arguments)
    assert len(asked) == 1 and len(compare.read(tmp_path / "runs.jsonl")) == 5
