"""Papers: roles of sentences, splits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def papers(example) -> ModuleType:
    return example("common.scientific_papers")


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
