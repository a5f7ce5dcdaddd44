"""How a checkpoint states widths: one for all FFNs of a setting, or layer by layer."""

from __future__ import annotations

import pytest
from architectures import ARCHITECTURES, BY_NAME

from peft_fusion.ffn import LayerList, find_ffns, state_widths


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_every_family_can_state_both(architecture, unchanged):
    model = architecture.make()
    check = unchanged(model)
    ffns = find_ffns(model)
    nothing = state_widths(model, {ffn.name: ffn.width for ffn in ffns})
    assert (nothing.values, nothing.layers, nothing.lists) == ({}, {}, [])
    one = state_widths(model, {ffn.name: 24 for ffn in ffns})
    assert (one.values, one.layers) == ({("", architecture.attribute): 24}, {})
    second = {ffn.name: 24 for ffn in ffns if any(part == "1" for part in ffn.name.split(".")[:4])}
    several = state_widths(model, second)
    assert several.values == {} and several.layers[""][1] == {architecture.attribute: 24}
    assert one.stock is type(model)
    check()


def test_where_the_layers_are():
    bert = state_widths(BY_NAME["bert"].make(), {"bert.encoder.layer.1": 24})
    assert bert.lists == [LayerList("bert.encoder.layer", "bert.encoder", "layer_idx")]
    assert bert.by_layer({"a": 1}) == {
        "a": 1,
        "per_layer_config": {str(n): {"intermediate_size": 24 if n == 1 else 64} for n in range(3)},
    }


def test_halves_that_share_a_config_must_agree():
    t5 = BY_NAME["t5"].make()
    names = [ffn.name for ffn in find_ffns(t5)]
    both = state_widths(t5, {name: 24 for name in names if ".block.1." in name})
    assert [one.path for one in both.lists] == ["encoder.block", "decoder.block"]
    with pytest.raises(ValueError, match="FFNs of layer 1 differ"):
        state_widths(t5, {name: 24 for name in names if name.startswith("encoder.block.1.")})


def test_modules_that_the_config_does_not_know():
    with pytest.raises(ValueError, match="no FFN 'extra.mlp'"):
        state_widths(BY_NAME["llama"].make(), {"extra.mlp": 24})
