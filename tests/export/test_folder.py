"""A folder is there whole or not at all, whenever the process that writes it is killed."""

from __future__ import annotations

import os
import random
import signal
import sys
import time

import pytest
from architectures import BY_NAME

from peft_fusion import export
from peft_fusion.export.folder import check_free, restore_replaced, written_whole

LLAMA = BY_NAME["llama"]
KILLS = 20


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_a_process(work):
    """Runs a function in a forked process; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def test_killed_at_any_moment_a_whole_folder_is_there(tmp_path):
    models, target = [LLAMA.make(seed) for seed in (0, 1)], tmp_path / "small"
    whole = []
    for model in models:
        started = time.perf_counter()
        export(model, target, check=False, overwrite=True)
        duration = time.perf_counter() - started
        whole.append(contents(target))
    assert whole[0] != whole[1]

    def work(first):
        for number in range(first, 1000):
            export(models[number % 2], target, check=False, overwrite=True)

    chance, seen, kills = random.Random(0), set(), 0
    while kills < KILLS or (seen != {0, 1} and kills < 10 * KILLS):  # a busy machine may need more to get through one
        child = in_a_process(lambda first=kills: work(first))
        time.sleep(chance.uniform(0, (3 + kills // KILLS) * duration))
        kills += 1
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        restore_replaced(target)  # what the next call does first
        assert contents(target) in whole
        seen.add(whole.index(contents(target)))
    assert seen == {0, 1}


def test_killed_before_the_first_one_is_whole_nothing_is_there(tmp_path, monkeypatch):
    model, target = LLAMA.make(), tmp_path / "small"
    monkeypatch.setattr(
        sys.modules["peft_fusion.export.written"], "card", lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    )
    _, status = os.waitpid(in_a_process(lambda: export(model, target, check=False)), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not target.exists()
    assert [path.name.startswith(".small.export-") for path in tmp_path.iterdir()] == [True]
    monkeypatch.undo()
    export(model, target, check=False)


@pytest.mark.parametrize("renames", [1, 2])
def test_killed_around_the_second_rename(tmp_path, monkeypatch, renames):
    target = tmp_path / "small"
    target.mkdir()
    (target / "config.json").write_text("old")
    rename, done = os.rename, []

    def killed_after(*args):
        rename(*args)
        done.append(args)
        if len(done) == renames:
            os.kill(os.getpid(), signal.SIGKILL)

    def work():
        monkeypatch.setattr(os, "rename", killed_after)
        with written_whole(target) as folder:
            (folder / "config.json").write_text("new")

    os.waitpid(in_a_process(work), 0)
    assert target.exists() == (renames == 2)
    check_free(target, overwrite=True)
    assert (target / "config.json").read_text() == ("old" if renames == 1 else "new")
    with written_whole(target) as folder:
        (folder / "config.json").write_text("newest")
    assert (target / "config.json").read_text() == "newest"
    assert not (tmp_path / ".small.replaced").exists()


def test_places_that_are_taken(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    check_free(tmp_path / "empty", overwrite=False)
    check_free(tmp_path / "nowhere" / "at" / "all", overwrite=False)
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "link", "other"]
    for name, overwrite, told in (
        ("file", True, "a file or a link"),
        ("link", True, "a file or a link"),
        ("other", False, "exists already"),
        ("other", True, "no model to overwrite"),
        ("file/small", False, "nothing can be written in .*file"),
    ):
        with pytest.raises(ValueError, match=told):
            check_free(tmp_path / name, overwrite)


def test_new_folders_have_the_permissions_of_others(tmp_path):
    with written_whole(tmp_path / "deep" / "small") as folder:
        (folder / "config.json").write_text("")
    (tmp_path / "other").mkdir()
    assert (tmp_path / "deep" / "small").stat().st_mode == (tmp_path / "other").stat().st_mode
