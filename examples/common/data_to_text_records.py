"""Data and the texts that say it: WebNLG's layouts, JSON-lines, and a stand-in made of WordNet's nouns.

Every record's data becomes one line, `subject : predicate : object | subject : ...`, for a causal LM to go on from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import hub_datasets as hub
from . import wordnet
from .errors import InputError
from .text_tasks import draw

DATA_COLUMNS = ("modified_triple_sets", "mtriple_set", "triples", "input", "data")
TEXT_COLUMNS = ("lex", "references", "text", "target")
TEST_SPLITS = ("test", "validation", "dev")
HYPERNYMS = ("@", "@i")  # WordNet's pointers to what a noun is a kind, or an instance, of
# The lexicographer files 03 to 28, which WordNet files its nouns in
# fmt: off
CLASSES = (
    "top", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling",
    "food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process",
    "quantity", "relation", "shape", "state", "substance", "time",
)
# fmt: on


@dataclass(frozen=True)
class Record:
    """Data on one line, and one or more texts that say the same."""

    data: str
    references: tuple[str, ...]


def load_records(name: str = "wordnet") -> tuple[list[Record], list[Record]]:
    """Records to train on, and to test with; no data is in both.

    Args:
        name: "wordnet", the path of a `data.noun`, a file of JSON-lines, a folder with `train.jsonl` and
            `test.jsonl`, or a Hub id or local path for `datasets`.

    Raises:
        InputError: no such data set, its files are missing, or its columns cannot be told.
    """
    if wordnet.is_wordnet(name):
        return held_out(wordnet_records(wordnet.read_nouns(name)))
    path = Path(name)
    if path.is_file() and path.suffix in (".json", ".jsonl"):
        return held_out(group(read_json_lines(path)))
    if (path / "train.jsonl").is_file():
        splits = {file.stem: read_json_lines(file) for file in sorted(path.glob("*.jsonl"))}
    else:
        splits = hub.load(name)
    return from_splits(name, splits)


def from_splits(name: str, splits: Any) -> tuple[list[Record], list[Record]]:
    """The training split and the first test or validation split that has texts; without one, a tenth of the former."""
    if "train" not in splits:
        raise InputError(f"`{name}` has no split `train`; it has {', '.join(splits)}")
    train = group(splits["train"])
    if not train:
        raise InputError(f"`{name}`: the split `train` has no record with data and a text")
    for split in TEST_SPLITS:
        if split in splits and (test := group(splits[split])):
            seen = {record.data for record in test}
            return [record for record in train if record.data not in seen], test
    return held_out(train)


def held_out(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """All but a tenth of the records (at least one), drawn at random, and that tenth."""
    if len(records) < 2:
        raise InputError(f"{len(records)} records are too few to train on some and test with others")
    shuffled = draw(records, None)
    cut = max(1, len(shuffled) // 10)
    return shuffled[cut:], shuffled[:cut]


def group(rows: Iterable[dict[str, Any]]) -> list[Record]:
    """One record for each data, with the texts of all rows that have it; rows without a text are left out."""
    found: dict[str, list[str]] = {}
    for row in rows:
        texts = references(row)
        if texts:
            found.setdefault(linearise(_column(row, DATA_COLUMNS, "data")), []).extend(texts)
    return [Record(data, tuple(dict.fromkeys(texts))) for data, texts in found.items()]


def linearise(value: Any) -> str:
    """Data on one line.

    Args:
        value: a text, as it is; a mapping, by its items; a list of triples, each "a | b | c", [a, b, c], or a mapping
            with the keys subject, property (or predicate) and object; or WebNLG's sets of triples, of which the first
            is taken, as the others are variants.
    """
    if isinstance(value, dict) and "mtriple_set" in value:
        value = value["mtriple_set"]
    if isinstance(value, dict):
        return " | ".join(f"{_plain(key)} : {_plain(item)}" for key, item in value.items())
    if isinstance(value, str):
        return " ".join(value.split())
    if value and isinstance(value[0], dict) and "mtriple_set" in value[0]:
        value = value[0]["mtriple_set"]
    if value and isinstance(value[0], list) and all("|" in part for part in value[0]):
        value = value[0]
    return " | ".join(" : ".join(map(_plain, _parts(triple))) for triple in value)


def references(row: dict[str, Any]) -> list[str]:
    """The texts of a row, from the first of its columns that has any."""
    _column(row, TEXT_COLUMNS, "text")
    for column in TEXT_COLUMNS:
        value = row.get(column) or []
        value = value.get("text", []) if isinstance(value, dict) else [value] if isinstance(value, str) else value
        texts = [" ".join((item["text"] if isinstance(item, dict) else item).split()) for item in value]
        if any(texts):
            return [text for text in texts if text]
    return []


def wordnet_records(lines: list[str]) -> list[Record]:
    """WordNet's nouns as data: (noun, also called, its synonyms), (noun, is a, hypernyms), (noun, class, ...) -> gloss.

    Args:
        lines: the entries of a `data.noun`.
    """
    parsed = [wordnet.split_entry(line) for line in lines]
    nouns = {fields[0]: fields[4 : 4 + 2 * int(fields[3], 16) : 2] for fields, _ in parsed}  # a word, then its sense
    records = []
    for fields, gloss in parsed:
        words, pointers = nouns[fields[0]], fields[5 + 2 * len(nouns[fields[0]]) :]
        above = [nouns[i][0] for kind, i in zip(pointers[::4], pointers[1::4], strict=False) if kind in HYPERNYMS]
        facts = [("also called", words[1:]), ("is a", above), ("class", [CLASSES[int(fields[1]) - 3]])]
        triples = [[words[0], predicate, ", ".join(objects)] for predicate, objects in facts if objects]
        records.append(Record(linearise(triples), (gloss,)))
    return records


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}") from error
    return rows


def _column(row: dict[str, Any], names: tuple[str, ...], role: str) -> Any:
    column = next((name for name in names if name in row), None)
    if column is None:
        raise InputError(f"no {role} column found in {sorted(row)}; expected one of {', '.join(names)}")
    return row[column]


def _parts(triple: Any) -> list[str]:
    if isinstance(triple, str):
        return [part.strip() for part in triple.split("|")]
    if isinstance(triple, dict):
        return [triple["subject"], triple.get("property") or triple["predicate"], triple["object"]]
    return list(triple)


def _plain(name: Any) -> str:
    """WebNLG's and WordNet's names have underscores for spaces."""
    return str(name).replace("_", " ").strip().strip('"')
