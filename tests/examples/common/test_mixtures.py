"""Upcycled mixtures compute what the dense model does, and removing experts leaves the salient ones."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from architectures import BY_NAME
from helpers import logits, relative
from moes import DEEPSEEK, MIXTRAL, QWEN2

from peft_fusion.ffn import find_experts, read_experts

LLAMA = BY_NAME["llama"]


@pytest.fixture
def mixtures(example) -> ModuleType:
    return example("common.mixtures")


def test_an_upcycled_model_computes_what_the_dense_one_does(mixtures):
    dense = LLAMA.make()
    expected = logits(dense, LLAMA)
    moe = mixtures.upcycled(dense, 2)
    assert [experts.count for experts in find_experts(moe)] == [4, 4]
    assert relative(logits(moe, LLAMA), expected) < 1e-5
    assert mixtures.difference(moe) < 1e-6


@pytest.mark.parametrize("moe", [MIXTRAL, QWEN2, DEEPSEEK], ids=lambda a: a.name)
def test_the_salient_experts_stay(mixtures, moe):
    model = moe.make()
    weak = 1
    for experts in find_experts(model):
        for weights in (read_experts(experts)[weak], read_experts(experts)[3]):
            weights.out_weight.mul_(1e-4)  # a view of the model's own: what it puts out hardly counts
    kept = [read_experts(experts) for experts in find_experts(model)]
    before = logits(model, moe)
    mixtures.remove_experts(model, [moe.batch()], 0.5)
    for experts, weights in zip(find_experts(model), kept, strict=True):
        assert experts.count == 2
        for left, index in zip(read_experts(experts), (0, 2), strict=True):
            assert torch.equal(left.out_weight, weights[index].out_weight)
    after = logits(model, moe)
    assert after.isfinite().all() and not torch.equal(after, before)
    assert model(**moe.batch(labels=True)).loss.isfinite()


def test_routers_train_on_request_only(mixtures):
    model = MIXTRAL.make()
    for routers in (False, True):
        mixtures.train_experts_alone(model, routers)
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(".mlp." in name for name in trains) and any("experts" in name for name in trains)
        assert any(".gate." in name for name in trains) == routers
