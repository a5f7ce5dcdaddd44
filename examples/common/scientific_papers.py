"""Scientific papers as data: 250 papers of computational linguistics, from the pip package `aclsum`.

The labelled task is sentence -> its role in the paper: people marked the sentences of each abstract, introduction
and conclusion that state the challenge, the approach or the outcome. Papers are split as the package splits them
(its validation papers are trained on), so no test sentence comes from a paper seen in training.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from .pip_files import package_folder

ACLSUM = ("aclsum", "aclsum==0.1.2")
SPLITS = {"train": ("train", "val"), "test": ("test",)}
ROLES = ("challenge", "approach", "outcome")
UNMARKED = "none"


def role_task(split: str, folder: Path | None = None) -> list[tuple[str, str]]:
    """(sentence, role) of the papers of "train" or "test".

    Most sentences have no role: of those, a random draw half as large as the rest keeps the classes balanced.
    """
    sentences = [pair for paper in read_papers(split, folder) for pair in sentences_with_role(paper)]
    marked = [pair for pair in sentences if pair[1] != UNMARKED]
    unmarked = [pair for pair in sentences if pair[1] == UNMARKED]
    return marked + random.Random(0).sample(unmarked, min(len(marked) // 2, len(unmarked)))


def sentences_with_role(paper: dict) -> Iterator[tuple[str, str]]:
    """Every sentence of a paper with its role; the few with two roles are left out."""
    for section, sentences in paper["sentences"].items():
        for i, sentence in enumerate(sentences):
            roles = [role for role in ROLES if paper["highlights"][role][section][i]]
            if len(roles) < 2:
                yield sentence, roles[0] if roles else UNMARKED


def paper_texts(split: str, folder: Path | None = None) -> list[str]:
    """The running text of each paper of "train" or "test"."""
    folder = folder or default_folder()
    texts = []
    for paper in read_papers(split, folder):
        path = folder / "paper_jsons" / f"{paper['id']}.json"
        parsed = json.loads(path.read_text(encoding="utf-8"))["pdf_parse"]
        texts.append("\n".join(paragraph["text"] for paragraph in parsed["body_text"]))
    return texts


def read_papers(split: str, folder: Path | None = None) -> list[dict]:
    """The records of a split: `id`, `sentences` by section, `highlights` (0 or 1) by role and section."""
    files = [(folder or default_folder()) / f"{part}.jsonl" for part in SPLITS[split]]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").split("\n")]
    return [json.loads(line) for line in lines if line]


def default_folder() -> Path:
    return package_folder(*ACLSUM) / "dataset"
