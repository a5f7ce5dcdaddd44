"""What all methods do to rows: select, stack and unstack, multiply a neuron's effect."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_fusion import IN, NEURONS, OUT, inputs, make, run

from peft_fusion.fusing.rows import balance, multiply_effect, select_rows, unstack_rows
from peft_fusion.fusing.symmetry import rescale
from peft_fusion.fusing.weights import stack_rows


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_selected_rows_are_those_neurons(gated, biases):
    weights, index = make(gated, biases), torch.tensor([3, 0, 3])
    selected = select_rows(weights, index)
    assert selected.width == 3 and selected.out_bias is weights.out_bias
    for block, full in zip(selected.blocks(), weights.blocks(), strict=True):
        for place, neuron in enumerate([3, 0, 3]):
            assert torch.equal(block[place], full[neuron])
    assert torch.equal(stack_rows(selected, torch.float64), stack_rows(weights, torch.float64)[index])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_unstacking_inverts_stacking(gated, biases):
    weights = make(gated, biases)
    again = unstack_rows(stack_rows(weights, torch.float64), weights)
    for block, full in zip(again.blocks(), weights.blocks(), strict=True):
        assert torch.equal(block, full)
    assert again.in_weights[0].shape == (NEURONS, IN) and again.out_weight.shape == (NEURONS, OUT)


@pytest.mark.parametrize("gated", [False, True])
def test_a_neuron_of_effect_three_counts_as_three_where_the_activation_is_linear(gated):
    weights = make(gated)
    counts = torch.arange(NEURONS, dtype=torch.float64) % 4
    repeated = select_rows(weights, torch.arange(NEURONS).repeat_interleave(counts.long()))
    linear = lambda z: 0.7 * z  # noqa: E731
    torch.testing.assert_close(run(multiply_effect(weights, counts), inputs(), linear), run(repeated, inputs(), linear))


def test_a_gated_neurons_effect_is_exact_and_a_plain_ones_is_not():
    counts = torch.full((NEURONS,), 3.0, dtype=torch.float64)
    for gated in (True, False):
        weights = make(gated)
        bias = weights.out_bias
        tripled = 3 * (run(weights, inputs(), F.gelu) - bias) + bias
        error = (run(multiply_effect(weights, counts), inputs(), F.gelu) - tripled).norm() / tripled.norm()
        assert (error < 1e-12) == gated


def test_balancing_removes_a_gated_ffns_symmetry_and_keeps_its_function():
    weights = make(gated=True)
    other = rescale(weights, torch.linspace(-3, 3.1, NEURONS, dtype=torch.float64))
    for a, b in zip(balance(weights).blocks(), balance(other).blocks(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(run(balance(weights), inputs()), run(weights, inputs()))


def test_balancing_an_ffn_without_symmetry_only_widens_its_dtype():
    weights = make(gated=False, dtype=torch.bfloat16)
    for a, b in zip(balance(weights).blocks(), weights.blocks(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())
