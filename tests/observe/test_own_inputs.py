"""Inputs of a model's own making: what they hold, and what they leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME
from torch import nn
from transformers import GenerationConfig

from peft_fusion.observe.own_inputs import own_inputs


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_they_are_repeatable_and_leave_the_model_alone(architecture, unchanged):
    model = architecture.make()
    check, state = unchanged(model), torch.get_rng_state()
    made = own_inputs(model, 70, 8, seed=0)
    check()
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(batch["input_ids"]) for batch in made] == [64, 6]
    assert all(value.shape[1] == 8 for batch in made for value in batch.values())
    again = own_inputs(architecture.make(), 70, 8, seed=0)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(made, again, strict=True) for key in a)
    assert not torch.equal(own_inputs(model, 70, 8, seed=1)[0]["input_ids"], made[0]["input_ids"])


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 1},
        {"return_dict_in_generate": True},
        {"num_return_sequences": 2, "do_sample": True},
        {"repetition_penalty": 5.0},
        {"max_length": 3},
        {"num_beams": 3},
        {"forced_eos_token_id": 5},
    ],
    ids=lambda s: next(iter(s)),
)
def test_the_generation_config_has_no_say(settings):
    llama = BY_NAME["llama"]
    expected = own_inputs(llama.make(), 8, 8, seed=0)[0]["input_ids"]
    model = llama.make()
    model.generation_config = GenerationConfig(**settings, bos_token_id=1, eos_token_id=2)
    before = copy.deepcopy(model.generation_config)
    assert torch.equal(own_inputs(model, 8, 8, seed=0)[0]["input_ids"], expected)
    assert model.generation_config == before


def test_an_interrupt_puts_the_generation_config_back(monkeypatch):
    model = BY_NAME["llama"].make()
    before = model.generation_config

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        own_inputs(model, 4, 8, seed=0)
    assert model.generation_config is before


def test_every_text_is_about_a_token_of_its_own_and_half_of_them_begin_with_the_start_token():
    model = BY_NAME["llama"].make()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)  # what it samples is no longer random
    text = own_inputs(model, 64, 8, seed=0)[0]["input_ids"]
    start = model.config.bos_token_id
    assert (text[:32, 0] == start).all()
    assert len(text[:32, 1].unique()) > 15 and len(text[32:, 0].unique()) > 15
    model.config.bos_token_id = None
    assert (own_inputs(model, 64, 8, seed=0)[0]["input_ids"][:, 0] == start).sum() < 8


def test_text_of_two_tokens_is_begun_and_not_continued():
    text = own_inputs(BY_NAME["llama"].make(), 4, 2, seed=0)[0]["input_ids"]
    assert text.shape == (4, 2) and (text[:2, 0] == 1).all()


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_one_token_is_enough(name):
    assert own_inputs(BY_NAME[name].make(), 4, 1, seed=0)[0]["input_ids"].shape == (4, 1)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_no_token_that_the_embedding_lacks(name):
    model = BY_NAME[name].make()
    model.config.vocab_size *= 100
    known = model.get_input_embeddings().num_embeddings
    made = torch.cat([batch["input_ids"] for batch in own_inputs(model, 32, 8, seed=0)])
    assert made.max() < known


def test_where_transformers_finds_no_embedding(monkeypatch):
    model = BY_NAME["bert"].make()

    def not_handled():
        raise NotImplementedError

    monkeypatch.setattr(model, "get_input_embeddings", not_handled)
    assert own_inputs(model, 4, 8, seed=0)[0]["input_ids"].max() < model.config.vocab_size


def test_a_model_without_a_vocabulary_needs_data():
    with pytest.raises(ValueError, match="no `config.vocab_size`.*Pass a `dataloader`"):
        own_inputs(nn.Linear(2, 2), 4, 8, seed=0)
