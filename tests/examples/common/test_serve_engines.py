"""Greedy generation by what is installed."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from architectures import BY_NAME
from tokenizers import Tokenizer, models, pre_tokenizers


@pytest.fixture
def engines(example):
    return example("common.serve_engines")


def test_transformers_generates_what_the_model_does(engines, tmp_path):
    model = BY_NAME["llama"].make()
    model.save_pretrained(tmp_path)
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 5, "two": 6}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(tmp_path)
    found = engines.generate("transformers", str(tmp_path), str(tmp_path), "one two", 5)
    ids = torch.tensor([[5, 6]])
    for _ in range(5):
        logits = model(input_ids=ids).logits[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf  # so many tokens, whatever is said
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert found["tokens"] == ids[0, 2:].tolist()
    assert found["prefill"] > 0 and found["decode"] > 0 and found["peak_memory"] > 50
    assert found["version"] == tf.__version__
    several = engines.generate("transformers", str(tmp_path), str(tmp_path), "one two one", 5, 3, prompt_tokens=2)
    assert several["tokens"] == found["tokens"]  # beside others, of a prompt that is cut to two tokens
    with pytest.raises(ValueError, match="a prompt of 300 tokens and 5 new ones: at most 256"):
        engines.generate("transformers", str(tmp_path), str(tmp_path), "one two", 5, 1, prompt_tokens=300)


def test_what_is_not_installed_is_named(engines, monkeypatch):
    monkeypatch.setitem(engines.ENGINES, "vllm", "no_such_module")
    assert engines.missing("vllm") == "no_such_module"
    assert engines.missing("transformers") is None
