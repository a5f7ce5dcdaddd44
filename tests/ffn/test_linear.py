"""FFNs of linear projections: read as rows of neurons, written back, and run."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME
from torch import nn

from peft_fusion.ffn import FFNLayout, by_projection, find_activation, find_ffns, projection_tensors, read_ffn, run_ffn


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
    for module, (weight, bias) in zip(ffn.projections, projection_tensors(weights, ffn), strict=True):
        own = module.weight if isinstance(module, nn.Linear) else module.weight.T
        assert torch.equal(weight, own)
        assert (bias is None) == (module.bias is None) and (bias is None or torch.equal(bias, module.bias))


def test_what_is_stacked_is_one_tensor_and_the_rest_one_each():
    gate, up = torch.randn(4, 2), torch.randn(4, 2)
    (llama, *_), (phi3, *_) = find_ffns(BY_NAME["llama"].make()), find_ffns(BY_NAME["phi3"].make())
    assert by_projection([gate, up], llama) == [gate, up]
    (stacked,) = by_projection([gate, up], phi3)
    assert torch.equal(stacked, torch.cat([gate, up]))
    assert by_projection([None, None], phi3) == [None] and by_projection([None, None], llama) == [None, None]


def test_activation_that_the_layout_does_not_name():
    (ffn, *_) = find_ffns(BY_NAME["opt"].make())
    del ffn.holder.activation_fn
    with pytest.raises(ValueError, match=r"activation of the FFN .* was not found .*FFNLayout\(..., activations="):
        find_activation(ffn)


def test_the_half_that_is_activated_comes_first():
    layout = FFNLayout(("a",), "b", stacked=True, gate_last=True)
    rows = torch.arange(6.0)
    assert [piece.tolist() for piece in layout.split(rows)] == [[3, 4, 5], [0, 1, 2]]
    assert torch.equal(layout.join(layout.split(rows)), rows)
