"""What an FFN puts out, against the FFN written out, and its hidden activations and slopes."""

from __future__ import annotations

import pytest
import torch
from test_calibrated import DIM, WIDTH, draw, make, outputs, plain
from torch.nn.functional import gelu, silu

from peft_fusion.fusing.activations import CHUNK, hidden_activations, in_chunks, look_inside, run
from peft_fusion.fusing.weights import FFNWeights, NarrowFFN, cast

KINDS = [(False, gelu, True), (True, silu, False), (True, silu, True)]


def scaled(weights: FFNWeights) -> NarrowFFN:
    scales = [draw(WIDTH, seed=60 + k) for k in range(len(weights.in_weights) + 1)]
    return NarrowFFN(weights, scales[0], tuple(scales[1:]))


@pytest.mark.parametrize(("gated", "activation", "bias"), KINDS)
def test_run_is_the_ffn_written_out(gated, activation, bias):
    weights, x = make(gated, bias), draw(2, 7, DIM, seed=5)
    torch.testing.assert_close(run(weights, activation, x), outputs(plain(weights), activation, x))
    narrow = scaled(weights)
    torch.testing.assert_close(run(narrow, activation, x), outputs(narrow, activation, x))
    only_out = NarrowFFN(weights, narrow.scale)
    torch.testing.assert_close(run(only_out, activation, x), outputs(only_out, activation, x))
    assert not torch.allclose(run(only_out, activation, x), run(narrow, activation, x))


@pytest.mark.parametrize(("gated", "activation", "bias"), KINDS)
def test_run_is_differentiable(gated, activation, bias):
    narrow, x = scaled(make(gated, bias)), draw(7, DIM, seed=5).requires_grad_()
    found = torch.autograd.grad(run(narrow, activation, x).square().sum(), x)
    expected = torch.autograd.grad(outputs(narrow, activation, x).square().sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_runs_in_float32(dtype):
    weights, x = cast(make(True), dtype), draw(7, DIM, seed=5).to(dtype)
    narrow = scaled(weights)
    narrow = NarrowFFN(weights, narrow.scale.float(), tuple(scale.float() for scale in narrow.in_scales))
    found = run(narrow, silu, x)
    assert found.dtype == torch.float32
    exact = NarrowFFN(cast(weights, torch.float64), narrow.scale, narrow.in_scales)
    torch.testing.assert_close(found.double(), outputs(exact, silu, x.double()), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("gated", "activation", "bias"), KINDS)
def test_hidden_activations_and_slopes(gated, activation, bias):
    weights, x = make(gated, bias), draw(CHUNK + 3, DIM, seed=5)
    hidden = hidden_activations(weights, activation, x)
    torch.testing.assert_close(
        hidden @ weights.out_weight + (weights.out_bias if bias else 0), run(weights, activation, x)
    )
    inside = look_inside(weights, activation, x)
    assert torch.equal(inside.hidden, hidden)
    parts = [look_inside(weights, activation, part) for part, none in in_chunks(x, None)]
    torch.testing.assert_close(torch.cat([part.hidden for part in parts]), hidden)
    step = 1e-6
    for k, slope in enumerate(inside.slopes):
        moved = FFNWeights(
            weights.in_weights,
            tuple(
                (0 if b is None else b) + step * (j == k) * torch.ones(WIDTH) for j, b in enumerate(weights.in_biases)
            ),
            weights.out_weight,
            None,
        )
        change = (hidden_activations(moved, activation, x) - hidden) / step
        torch.testing.assert_close(change, slope, rtol=1e-4, atol=1e-4)


def test_hidden_activations_of_half_precision_are_computed_in_float32():
    weights, x = cast(make(True), torch.bfloat16), draw(9, DIM, seed=5).bfloat16()
    found = hidden_activations(weights, silu, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, hidden_activations(cast(weights, torch.float32), silu, x.float()))
