"""Data and the texts that say it: WebNLG's layouts, linearised data, JSON-lines, WordNet."""

from __future__ import annotations

import json
from types import ModuleType

import pytest

TRIPLES = ["Alan_Bean | birthPlace | Wheeler,_Texas", "Alan_Bean | nationality | United_States"]
LINE = "Alan Bean : birthPlace : Wheeler, Texas | Alan Bean : nationality : United States"


@pytest.fixture
def records(example) -> ModuleType:
    return example("common.data_to_text_records")


@pytest.mark.parametrize(
    "value",
    [
        TRIPLES,
        [TRIPLES],
        [TRIPLES, ["a | variant | of it"]],
        {"mtriple_set": [TRIPLES]},
        [{"mtriple_set": TRIPLES}, {"mtriple_set": ["a | variant | of it"]}],
        [triple.split(" | ") for triple in TRIPLES],
        [dict(zip(("subject", "property", "object"), triple.split(" | "), strict=True)) for triple in TRIPLES],
        [dict(zip(("subject", "predicate", "object"), triple.split(" | "), strict=True)) for triple in TRIPLES],
    ],
)
def test_triples_in_every_layout(records, value):
    assert records.linearise(value) == LINE


def test_mappings_and_texts_as_data(records):
    assert records.linearise({"home_team": "Ajax", "goals": 3}) == "home team : Ajax | goals : 3"
    assert records.linearise("as  it_is\n here") == "as it_is here"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"lex": {"text": ["one", "two"], "lid": ["Id1", "Id2"]}}, ["one", "two"]),
        ({"lex": [{"text": "one", "lid": "Id1"}, {"text": "two"}]}, ["one", "two"]),
        ({"references": [], "target": "one"}, ["one"]),
        ({"references": ["one", "two"], "target": "one"}, ["one", "two"]),
        ({"text": " one\nline "}, ["one line"]),
        ({"lex": {"text": []}}, []),
    ],
)
def test_references_in_every_layout(records, columns, expected):
    assert records.references(columns) == expected


def test_rows_of_the_same_data_are_one_record(records):
    rows = [{"data": "x", "text": "a"}, {"data": "y", "text": "b"}, {"data": "x", "references": ["c", "a"]}]
    assert records.group(rows) == [records.Record("x", ("a", "c")), records.Record("y", ("b",))]


@pytest.mark.parametrize(("row", "message"), [({"text": "a"}, "no data column"), ({"data": "a", "x": 1}, "no text")])
def test_missing_columns_are_named(records, row, message):
    with pytest.raises(ValueError, match=message):
        records.group([row])


def test_web_nlg_as_datasets_gives_it(records):
    datasets = pytest.importorskip("datasets")

    def split(*names: str):
        triples = [{"mtriple_set": [[f"{name} | is | it"]]} for name in names]
        lex = [{"text": [f"{name} is.", f"It is {name}."], "lid": ["1", "2"]} for name in names]
        return datasets.Dataset.from_dict({"modified_triple_sets": triples, "lex": lex})

    unlabelled = datasets.Dataset.from_dict({"modified_triple_sets": [{"mtriple_set": [["D | is | it"]]}], "lex": [{}]})
    splits = datasets.DatasetDict({"train": split("A", "B"), "dev": split("B", "C"), "test": unlabelled})
    train, test = records.from_splits("web_nlg", splits)
    assert train == [records.Record("A : is : it", ("A is.", "It is A."))]  # B is tested, so not trained on
    assert [record.data for record in test] == ["B : is : it", "C : is : it"]


def test_json_lines(records, tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(json.dumps({"data": f"d{i}", "text": f"t{i}"}) for i in range(20)) + "\n")
    train, test = records.load_records(str(path))
    assert (len(train), len(test)) == (18, 2)
    assert {(record.data, *record.references) for record in train + test} == {(f"d{i}", f"t{i}") for i in range(20)}


def test_folder_of_json_lines(records, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"data": split, "references": ["a", "b"]}))
    train, test = records.load_records(str(tmp_path))
    assert train == [records.Record("train", ("a", "b"))]
    assert test == [records.Record("test", ("a", "b"))]


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"data": "a", "text": "b"}\n{"data"', "line 2 is not JSON"), ('{"data": "a", "text": "b"}', "too few")],
)
def test_unusable_json_lines(records, tmp_path, text, message):
    path = tmp_path / "facts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        records.load_records(str(path))


def test_wordnet_nouns_as_triples(records):
    lines = [
        "00000001 04 n 01 onset 2 001 ~ 00000002 n 0000 | an attack",
        '00000002 04 n 03 foray 0 raid 0 sea_raid 0 002 @ 00000001 n 0000 + 09 v 0301 | a sudden attack; "a raid"  ',
        "00000003 18 n 01 Drake 0 001 @i 00000002 n 0000 | a man",
        f"00000004 05 n 0a {'dog 0 ' * 10}001 @ 00000001 n 0000 | a beast",  # ten words: the count is hexadecimal
    ]
    assert [(record.data, record.references) for record in records.wordnet_records(lines)] == [
        ("onset : class : act", ("an attack",)),
        ("foray : also called : raid, sea raid | foray : is a : onset | foray : class : act", ("a sudden attack",)),
        ("Drake : is a : foray | Drake : class : person", ("a man",)),
        (f"dog : also called : {', '.join(['dog'] * 9)} | dog : is a : onset | dog : class : animal", ("a beast",)),
    ]
