"""Finding FFNs, and layouts of one's own."""

from __future__ import annotations

import pytest
import torch
from architectures import BY_NAME
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_fusion.ffn import FFNLayout, find_ffns, places, register_layout
from peft_fusion.ffn.layouts import LAYOUTS


@pytest.mark.parametrize(
    ("activation", "power"),
    [("relu", 1), ("leaky_relu", 1), ("relu2", 2), ("relu6", None), ("gelu", None), ("silu", None), ("tanh", None)],
)
def test_homogeneity_is_what_the_activation_does(activation, power):
    (ffn, *_) = find_ffns(BY_NAME["opt"].make(activation_function=activation))
    assert ffn.homogeneity == power
    x = torch.linspace(-8, 8, 50)
    powers = [k for k in (1, 2) if torch.allclose(ffn.activation(3 * x), 3**k * ffn.activation(x), atol=1e-5)]
    assert powers == ([] if power is None else [power])


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.shrink, self.act_fn = nn.Linear(8, 24), nn.Linear(24, 8), nn.ReLU()


def test_a_layout_can_be_registered():
    assert not find_ffns(Odd())
    layout = FFNLayout(("expand",), "shrink")
    register_layout(layout)
    try:
        (ffn,) = find_ffns(Odd())
        assert (ffn.name, ffn.width, ffn.in_dim, ffn.out_dim) == ("", 24, 8, 8)
        assert ffn.paths == ffn.projection_names == ("expand", "shrink")
    finally:
        LAYOUTS.remove(layout)


@pytest.mark.parametrize(
    "layout",
    [FFNLayout((), "out"), FFNLayout(("a", "b", "c"), "out"), FFNLayout(("a", "b"), "out", stacked=True)],
)
def test_layouts_that_make_no_sense(layout):
    with pytest.raises(ValueError, match="layout"):
        register_layout(layout)


def test_same_names_with_other_shapes_are_no_ffn():
    holder = nn.Module()
    holder.fc1, holder.fc2 = nn.Linear(8, 24), nn.Linear(10, 8)
    assert not find_ffns(holder)


def test_paths_are_below_the_holder_and_names_in_the_model():
    bert = find_ffns(BY_NAME["bert"].make())[1]
    assert bert.paths == ("intermediate.dense", "output.dense")
    assert bert.projection_names == ("bert.encoder.layer.1.intermediate.dense", "bert.encoder.layer.1.output.dense")
    assert bert.projections == (bert.holder.intermediate.dense, bert.holder.output.dense)


def test_places_of_modules_that_are_held_twice():
    llama = BY_NAME["llama"].make()
    layers = llama.model.layers
    layers[2].mlp.up_proj = layers[0].mlp.up_proj
    layers[1] = layers[0]
    found = places(llama)
    assert found[id(layers[0].mlp.up_proj)] == ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"]
    assert found[id(layers[0])] == ["model.layers.0", "model.layers.1"]
    assert found[id(layers[0].mlp.down_proj)] == ["model.layers.0.mlp.down_proj"]


def test_a_holder_that_another_adapter_trains_in_full_is_found_as_well():
    model = get_peft_model(BY_NAME["llama"].make(), LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]))
    assert "model.layers.0.mlp" in {ffn.name for ffn in find_ffns(model.get_base_model())}
