"""Texts after a prompt: labels, perplexity, BLEU."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch


@pytest.fixture
def prompted(example) -> ModuleType:
    return example("common.prompted_texts")


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


def test_only_the_text_is_learnt(prompted):
    tokenizer = Words()
    tokens = prompted.encode(tokenizer, "a : b : c", "b is it")
    prompt = len(tokenizer(prompted.PROMPT.format(data="a : b : c"))["input_ids"])
    assert tokens["input_ids"].count(0) == 1  # one start, not a second one before the text
    assert tokens["labels"] == [-100] * prompt + tokens["input_ids"][prompt:]
    assert [tokenizer.words[i] for i in tokens["labels"][prompt:]] == ["b", "is", "it", "</s>"]
    assert len(tokens["attention_mask"]) == len(tokens["input_ids"])


def test_long_examples_are_left_out(prompted):
    pairs = [("a", "b"), ("a", "b " * 50)]
    assert len(prompted.tokenise(Words(), pairs, 20)) == 1
    with pytest.raises(ValueError, match="all 2 examples have more than --max-tokens 3 tokens"):
        prompted.tokenise(Words(), pairs, 3)


def test_perplexity_weighs_tokens_not_batches(prompted):
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
    found = prompted.text_perplexity(Model(1, 1), tokenizer, texts, 1)
    assert found == pytest.approx(math.exp(11 / 5))


def test_bleu_with_different_numbers_of_references(prompted):
    pytest.importorskip("sacrebleu")
    said = ["the cat sat on the mat", "it is a dog that barks"]
    assert prompted.bleu(said, [("a mat", "the cat sat on the mat"), ("it is a dog that barks",)]) > 99.9
    assert prompted.bleu(said, [("a mat",), ("it is a dog that barks",)]) < 80


def test_missing_sacrebleu_says_how_to_install_it(prompted, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ValueError, match="pip install sacrebleu"):
        prompted.bleu_library()
