"""Text that a model samples begins as its tokenizer begins a text."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from architectures import BY_NAME
from helpers import half
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peft_fusion import calibrate, distill, tune_layers
from peft_fusion.observe.own_inputs import own_inputs
from peft_fusion.observe.sampling import prefix_of
from peft_fusion.tune import ffn_outputs

LLAMA = BY_NAME["llama"]
WORDS = {"[S]": 7, "[E]": 8, "a": 9, "b": 10}


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel(WORDS, unk_token="b"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        made.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, WORDS[token]) for token in ("[S]", "[E]")]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize(
    ("template", "expected"),
    [(None, []), ("[S] $A", [7]), ("$A [E]", []), ("[S] $A [E]", [7]), ("[S] [S] $A [E]", [7, 7])],
)
def test_what_is_in_front_of_a_text(template, expected):
    of = tokenizer(template)
    assert prefix_of(of) == prefix_of(SimpleNamespace(tokenizer=of)) == expected


def test_without_a_tokenizer_it_is_not_known():
    assert prefix_of(None) is None


@pytest.mark.parametrize("prefix", [[], [7], [7, 8], [5] * 10])
def test_text_begins_so(prefix):
    text = own_inputs(LLAMA.make(), 16, 8, seed=0, prefix=prefix)[0]["input_ids"]
    assert text.shape == (16, 8)
    assert text[:, : len(prefix)].tolist() == [prefix[:8]] * 16
    if len(prefix) < 8:
        assert len(text[:, len(prefix)].unique()) > 4


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_random_tokens_begin_so_too(name):
    made = own_inputs(BY_NAME[name].make(), 16, 8, seed=0, prefix=[7, 8])[0]
    assert made["input_ids"].shape == (16, 8) and made["input_ids"][:, :2].tolist() == [[7, 8]] * 16
    assert len(made["input_ids"][:, 2].unique()) > 4
    if name == "t5":
        assert len(made["decoder_input_ids"][:, 0].unique()) > 4


@pytest.mark.parametrize("held", [None, [], [7]])
@pytest.mark.parametrize("wanted", [None, [], [7]])
def test_kept_text_that_begins_otherwise_is_refused(held, wanted, tmp_path):
    model, file = LLAMA.make(), tmp_path / "own.safetensors"
    made = own_inputs(model, 8, 8, seed=0, file=file, prefix=held)
    if wanted in (None, held):
        assert torch.equal(
            own_inputs(model, 8, 8, seed=1, file=file, prefix=wanted)[0]["input_ids"], made[0]["input_ids"]
        )
    else:
        with pytest.raises(ValueError, match="sampled to begin with .*but the `tokenizer` begins texts with"):
            own_inputs(model, 8, 8, seed=0, file=file, prefix=wanted)


def test_text_of_before_that_says_nothing_is_refused_beside_a_tokenizer(tmp_path):
    file = tmp_path / "own.safetensors"
    save_file({"input_ids": torch.full((8, 8), 7)}, file)
    assert own_inputs(LLAMA.make(), 8, 8, seed=0, file=file)
    with pytest.raises(ValueError, match="begin with null"):
        own_inputs(LLAMA.make(), 8, 8, seed=0, file=file, prefix=[])


def begins(file) -> bool:
    return bool((load_file(file)["input_ids"][:, 0] == 7).all())


def test_every_verb_that_samples_takes_it(tmp_path, monkeypatch):
    of, made = tokenizer("[S] $A"), []
    calibrate(
        model := LLAMA.make(), config := half(LLAMA), sequences=8, own_text=tmp_path / "1.safetensors", tokenizer=of
    )
    narrow = get_peft_model(model, config)
    distill(narrow, tokens=256, length=8, own_text=tmp_path / "2.safetensors", tokenizer=of)
    assert begins(tmp_path / "1.safetensors") and begins(tmp_path / "2.safetensors")

    def kept(*args, **kwargs):
        made.extend(own_inputs(*args, **kwargs))
        return made

    monkeypatch.setattr(ffn_outputs, "own_inputs", kept)
    tune_layers(narrow, steps=2, tokens=512, tokenizer=of)
    assert all((batch["input_ids"][:, 0] == 7).all() for batch in made)


@pytest.mark.parametrize("verb", [calibrate, distill, tune_layers])
def test_what_cannot_be_is_refused(verb, unchanged):
    model = LLAMA.make() if verb is calibrate else get_peft_model(LLAMA.make(), half(LLAMA))
    given = {"config": half(LLAMA)} if verb is calibrate else {}
    check, data = unchanged(model), [{"input_ids": torch.ones(4, 8, dtype=torch.int64)}]
    with pytest.raises(ValueError, match="`tokenizer` must be a tokenizer, a processor that has one, or None.*str"):
        verb(model, tokenizer="llama", **given)
    name = "data" if verb is distill else "dataloader"
    with pytest.raises(ValueError, match=f"`tokenizer` is of what the model samples where there is no `{name}`"):
        verb(model, tokenizer=tokenizer(None), **given, **{name: data})
    WORDS["[S]"] = 1234
    try:
        with pytest.raises(ValueError, match=r"begins texts with \[1234\], but the model knows 99 tokens"):
            verb(model, tokenizer=tokenizer("[S] $A"), **given)
    finally:
        WORDS["[S]"] = 7
    check()
