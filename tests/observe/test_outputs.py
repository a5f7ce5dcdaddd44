"""What a network puts out: language models' logits told from other heads', and trained heads from new ones."""

from __future__ import annotations

import pytest
import torch
from architectures import BY_NAME
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from peft_fusion import FusionConfig
from peft_fusion.observe.outputs import has_trained_head, speaks
from peft_fusion.observe.unwrap import unwrapped

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 50}


@pytest.mark.parametrize(
    ("hidden", "logits", "expected"),
    [
        ((2, 5, 8), (2, 5, 99), True),
        ((2, 5, 8), (2, 5, 3), False),  # a class for every token
        ((2, 5, 8), (2, 99), False),  # a class for every sequence, however many there are
        (None, (2, 5, 3), True),
        ((2, 5, 8), None, False),
    ],
)
def test_language_models(hidden, logits, expected):
    made = [None if shape is None else torch.zeros(shape) for shape in (hidden, logits)]
    assert speaks(*made) is expected


def test_a_head_is_trained_once_a_bias_is_not_zero():
    model = BertForSequenceClassification(BertConfig(**SMALL))
    assert not has_trained_head(model)
    nn.init.ones_(model.bert.encoder.layer[0].output.dense.bias)  # of the backbone
    assert not has_trained_head(model)
    model.classifier.bias.data[1] = 1e-6
    assert has_trained_head(model)


def test_a_head_without_a_bias_does_not_tell():
    assert not has_trained_head(LlamaForSequenceClassification(LlamaConfig(**SMALL)))


def test_a_copy_that_trains_counts():
    model = BertForSequenceClassification(BertConfig(**SMALL))
    host = unwrapped(get_peft_model(model, FusionConfig(ratio=0.5, modules_to_save=["classifier"])))
    assert not has_trained_head(host)
    nn.init.ones_(host.classifier.modules_to_save["default"].bias)
    assert has_trained_head(host)


def test_a_model_that_is_its_own_backbone_has_none():
    assert not has_trained_head(BY_NAME["llama"].make().model.layers[0])
