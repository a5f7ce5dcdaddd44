"""The data-to-text example: WebNLG's layouts, linearised data, labels, BLEU, the paper's settings."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

TRIPLES = ["Alan_Bean | birthPlace | Wheeler,_Texas", "Alan_Bean | nationality | United_States"]
LINE = "Alan Bean : birthPlace : Wheeler, Texas | Alan Bean : nationality : United States"


@pytest.fixture
def linearise(example):
    return example("linearise")


@pytest.fixture
def data_to_text(example):
    pytest.importorskip("transformers")
    return example("data_to_text")


@pytest.fixture
def generation(example):
    pytest.importorskip("transformers")
    return example("generation")


# --- data on one line


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
def test_triples_in_every_layout(linearise, value):
    assert linearise.linearise(value) == LINE


def test_mappings_and_texts_as_data(linearise):
    assert linearise.linearise({"home_team": "Ajax", "goals": 3}) == "home team : Ajax | goals : 3"
    assert linearise.linearise("as  it_is\n here") == "as it_is here"


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
def test_references_in_every_layout(linearise, columns, expected):
    assert linearise.references(columns) == expected


def test_rows_of_the_same_data_are_one_record(linearise):
    rows = [{"data": "x", "text": "a"}, {"data": "y", "text": "b"}, {"data": "x", "references": ["c", "a"]}]
    assert linearise.group(rows) == [linearise.Record("x", ("a", "c")), linearise.Record("y", ("b",))]


@pytest.mark.parametrize(("row", "message"), [({"text": "a"}, "no data column"), ({"data": "a", "x": 1}, "no text")])
def test_missing_columns_are_named(linearise, row, message):
    with pytest.raises(ValueError, match=message):
        linearise.group([row])


# --- where records come from


def test_web_nlg_as_datasets_gives_it(linearise):
    datasets = pytest.importorskip("datasets")

    def split(*names: str):
        triples = [{"mtriple_set": [[f"{name} | is | it"]]} for name in names]
        lex = [{"text": [f"{name} is.", f"It is {name}."], "lid": ["1", "2"]} for name in names]
        return datasets.Dataset.from_dict({"modified_triple_sets": triples, "lex": lex})

    unlabelled = datasets.Dataset.from_dict({"modified_triple_sets": [{"mtriple_set": [["D | is | it"]]}], "lex": [{}]})
    splits = datasets.DatasetDict({"train": split("A", "B"), "dev": split("B", "C"), "test": unlabelled})
    train, test = linearise.from_splits("web_nlg", splits)
    assert train == [linearise.Record("A : is : it", ("A is.", "It is A."))]  # B is tested, so not trained on
    assert [record.data for record in test] == ["B : is : it", "C : is : it"]


def test_json_lines(linearise, tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(json.dumps({"data": f"d{i}", "text": f"t{i}"}) for i in range(20)) + "\n")
    train, test = linearise.load_records(str(path))
    assert (len(train), len(test)) == (18, 2)
    assert {(record.data, *record.references) for record in train + test} == {(f"d{i}", f"t{i}") for i in range(20)}


def test_folder_of_json_lines(linearise, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"data": split, "references": ["a", "b"]}))
    train, test = linearise.load_records(str(tmp_path))
    assert train == [linearise.Record("train", ("a", "b"))]
    assert test == [linearise.Record("test", ("a", "b"))]


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"data": "a", "text": "b"}\n{"data"', "line 2 is not JSON"), ('{"data": "a", "text": "b"}', "too few")],
)
def test_unusable_json_lines(linearise, tmp_path, text, message):
    path = tmp_path / "facts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        linearise.load_records(str(path))


def test_wordnet_nouns_as_triples(linearise):
    lines = [
        "  1 This software and database is being provided",
        "00000001 04 n 01 onset 2 001 ~ 00000002 n 0000 | an attack",
        '00000002 04 n 03 foray 0 raid 0 sea_raid 0 002 @ 00000001 n 0000 + 09 v 0301 | a sudden attack; "a raid"  ',
        "00000003 18 n 01 Drake 0 001 @i 00000002 n 0000 | a man",
        f"00000004 05 n 0a {'dog 0 ' * 10}001 @ 00000001 n 0000 | a beast",  # ten words: the count is hexadecimal
    ]
    assert [(record.data, record.references) for record in linearise.wordnet_records(lines)] == [
        ("onset : class : act", ("an attack",)),
        ("foray : also called : raid, sea raid | foray : is a : onset | foray : class : act", ("a sudden attack",)),
        ("Drake : is a : foray | Drake : class : person", ("a man",)),
        (f"dog : also called : {', '.join(['dog'] * 9)} | dog : is a : onset | dog : class : animal", ("a beast",)),
    ]


# --- tokens, labels, scores


class Words:
    """A tokenizer of words: <s> is 0, the end is 1, the others count from 2 on."""

    eos_token_id = 1

    def __init__(self) -> None:
        self.words = ["<s>", "</s>"]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return {"input_ids": [0] * add_special_tokens + [self.words.index(word) for word in text.split()]}


def test_only_the_text_is_learnt(generation):
    tokenizer = Words()
    tokens = generation.encode(tokenizer, "a : b : c", "b is it")
    prompt = len(tokenizer(generation.PROMPT.format(data="a : b : c"))["input_ids"])
    assert tokens["input_ids"].count(0) == 1  # one start, not a second one before the text
    assert tokens["labels"] == [-100] * prompt + tokens["input_ids"][prompt:]
    assert [tokenizer.words[i] for i in tokens["labels"][prompt:]] == ["b", "is", "it", "</s>"]
    assert len(tokens["attention_mask"]) == len(tokens["input_ids"])


def test_long_examples_are_left_out(generation):
    pairs = [("a", "b"), ("a", "b " * 50)]
    assert len(generation.tokenise(Words(), pairs, 20)) == 1
    with pytest.raises(ValueError, match="all 2 examples have more than --max-tokens 3 tokens"):
        generation.tokenise(Words(), pairs, 3)


def test_perplexity_weighs_tokens_not_batches(generation):
    """A model whose loss is 1 on texts of one token and 3 on one of three: (1 + 1 + 9) / 5 over the tokens."""

    class Model(torch.nn.Linear):
        def forward(self, labels, **_):
            return SimpleNamespace(loss=float((labels[:, 1:] != -100).sum(1).float().mean()))

    tokenizer = SimpleNamespace(
        padding_side="right",
        pad=lambda features, **_: {k: torch.tensor([f[k] for f in features]) for k in features[0]},
    )
    texts = [
        {"input_ids": [5] * (2 + n), "attention_mask": [1] * (2 + n), "labels": [-100, -100] + [5] * n}
        for n in (1, 3, 1)
    ]
    found = generation.text_perplexity(Model(1, 1), tokenizer, texts, 1)
    assert found == pytest.approx(math.exp(11 / 5))


def test_bleu_with_different_numbers_of_references(generation):
    pytest.importorskip("sacrebleu")
    said = ["the cat sat on the mat", "it is a dog that barks"]
    assert generation.bleu(said, [("a mat", "the cat sat on the mat"), ("it is a dog that barks",)]) > 99.9
    assert generation.bleu(said, [("a mat",), ("it is a dog that barks",)]) < 80


def test_missing_sacrebleu_says_how_to_install_it(generation, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    with pytest.raises(ValueError, match="pip install sacrebleu"):
        generation.bleu_library()


# --- settings


def test_the_papers_settings(data_to_text):
    options = data_to_text.parse_arguments(["--preset", "paper"])
    assert (options.ratio, options.layers, options.calibrate) == (0.25, "last-two-thirds", False)
    assert (options.batch_size, options.settings) == (8, {"weight_decay": 0.1})
    assert 2e-5 <= options.learning_rate <= 6e-5


def test_smoke_is_short_under_any_preset(data_to_text):
    options = data_to_text.parse_arguments(["--smoke", "--preset", "paper"])
    assert (options.steps, options.max_test, options.beams) == (3, 2, 1)
