"""Finding FFNs, reading them as rows of neurons, and writing them back."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME
from torch import nn

from peft_fusion.ffn import FFNLayout, find_ffns, projection_tensors, read_ffn, register_layout, run_ffn
from peft_fusion.ffn.layouts import LAYOUTS


def by_the_formula(weights, activation, x: torch.Tensor) -> torch.Tensor:
    """An FFN's output from its rows, as the docstring of `FFNWeights` has it."""
    ins = [x @ w.T + (0 if b is None else b) for w, b in zip(weights.in_weights, weights.in_biases, strict=True)]
    hidden = activation(ins[0]) * (ins[1] if weights.gated else 1)
    return hidden @ weights.out_weight + (0 if weights.out_bias is None else weights.out_bias)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_rows_compute_what_the_model_computes(architecture):
    x = torch.randn(5, 32)
    for ffn in find_ffns(architecture.make()):
        torch.testing.assert_close(by_the_formula(read_ffn(ffn), ffn.activation, x), run_ffn(ffn, ffn.projections, x))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_reading_copies_nothing_and_writing_inverts_it(architecture):
    ffn = find_ffns(architecture.make())[0]
    weights = read_ffn(ffn)
    storages = {p.untyped_storage().data_ptr() for m in ffn.projections for p in m.parameters()}
    assert all(block.untyped_storage().data_ptr() in storages for block in weights.blocks())
    for module, (weight, bias) in zip(ffn.projections, projection_tensors(weights, ffn.layout), strict=True):
        own = module.weight if isinstance(module, nn.Linear) else module.weight.T
        assert torch.equal(weight, own)
        assert (bias is None) == (module.bias is None) and (bias is None or torch.equal(bias, module.bias))


def test_activations_degree_of_homogeneity():
    assert find_ffns(BY_NAME["opt"].make())[0].homogeneity == 1
    assert find_ffns(BY_NAME["t5"].make())[0].homogeneity == 1
    assert find_ffns(BY_NAME["gpt2"].make())[0].homogeneity is None


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
        assert (ffn.name, ffn.width, ffn.projection_names) == ("", 24, ("expand", "shrink"))
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
    holder.fc1, holder.fc2 = nn.Linear(8, 24), nn.Linear(12, 8)
    assert not find_ffns(holder)
