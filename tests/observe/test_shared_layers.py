"""Layers that a model shares with its original: which ones, and that they run once."""

from __future__ import annotations

import pytest
import torch
from architectures import BY_NAME
from peft import LoraConfig, get_peft_model

from peft_fusion import FusionConfig
from peft_fusion.observe.shared_layers import SharedLayers, shared_layers
from peft_fusion.observe.unwrap import unwrapped

LLAMA = BY_NAME["llama"]


def adapted(layers, name: str = "llama", **settings):
    architecture = BY_NAME[name]
    return get_peft_model(architecture.make(), FusionConfig(ratio=0.5, layers_to_transform=layers, **settings))


def trained(model) -> list[str]:
    return [name for name, parameter in unwrapped(model).named_parameters() if parameter.requires_grad]


def found(model) -> int:
    return len(shared_layers(unwrapped(model), trained(model)).layers)


@pytest.mark.parametrize(("layers", "count"), [([2], 2), ([1, 2], 1), ([1], 1), ([0, 2], 0), (None, 0)])
def test_those_below_the_first_narrow_one(layers, count):
    model = adapted(layers)
    assert found(model) == count
    inner = unwrapped(model)
    expected = list(inner.model.layers)[:count]
    assert all(a is b for a, b in zip(shared_layers(inner, trained(model)).layers, expected, strict=True))


def test_nothing_is_shared_with_what_trains_elsewhere():
    model = adapted([2])
    inner = unwrapped(model)
    assert len(shared_layers(inner, ["model.embed_tokens.weight"]).layers) == 0
    assert len(shared_layers(inner, ["model.layers.1.self_attn.q_proj.weight"]).layers) == 1
    assert len(shared_layers(inner, ["model.layers.0.input_layernorm.weight"]).layers) == 0
    assert len(shared_layers(inner, []).layers) == 2
    assert len(shared_layers(LLAMA.make(), []).layers) == 0


def test_ffns_in_two_lists_share_nothing():
    assert found(adapted(None, "t5")) == 0


def test_they_give_what_was_noted_and_are_as_before():
    model = unwrapped(adapted([2]))
    shared = shared_layers(model, [])
    batch, other = LLAMA.batch(seed=1), LLAMA.batch(seed=2)
    with torch.no_grad():
        with shared.noting():
            expected = model(**batch).logits
        with shared.skipped():
            assert torch.equal(model(**batch).logits, expected)
        with shared.noting():
            model(**other)
        calls: list[int] = []
        handles = [layer.self_attn.register_forward_hook(lambda *_: calls.append(1)) for layer in model.model.layers]
        with shared.skipped():
            assert not torch.equal(model(**batch).logits, expected)  # `other`'s outputs went on
        assert len(calls) == 1
        for handle in handles:
            handle.remove()
        assert torch.equal(model(**batch).logits, expected)
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_a_forward_of_ones_own_is_put_back():
    model = unwrapped(adapted([2]))
    layer = model.model.layers[0]
    own = layer.forward
    layer.forward = own
    shared = SharedLayers([layer])
    with pytest.raises(KeyboardInterrupt), shared.skipped():
        raise KeyboardInterrupt
    assert vars(layer)["forward"] is own


def test_lora_below_that_trains_shares_nothing():
    model = get_peft_model(LLAMA.make(), LoraConfig(target_modules=["q_proj"]))
    assert found(model) == 0
