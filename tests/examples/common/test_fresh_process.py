"""Functions called in a process of their own."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def run_fresh(example):
    return example("common.fresh_process").run_fresh


def test_a_result_comes_back(run_fresh, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "common").mkdir()  # a folder of the user's own, which must not be taken for the examples'
    (tmp_path / "common" / "__init__.py").touch()
    assert run_fresh("common.command_line:layer_indices", text="0,2-3", count=4) == [0, 2, 3]
    assert run_fresh("os:getpid") != os.getpid()


def test_what_is_wrong_is_told_by_the_process_and_ends_the_example(run_fresh, capfd):
    with pytest.raises(SystemExit) as ended:
        run_fresh("common.command_line:layer_indices", text="9", count=4)
    assert ended.value.code == 1
    assert capfd.readouterr().err == "error: --layers 9: the model has layers 0-3\n"
