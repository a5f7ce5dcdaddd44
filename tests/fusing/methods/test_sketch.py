"""The baseline "sketch" against explicit sums, and its mean over many seeds."""

from __future__ import annotations

import pytest
import torch
from test_fusion import IN, NEURONS, inputs, make, run, run_narrow

from peft_fusion.fusing.methods.pruning import norm_products
from peft_fusion.fusing.methods.sketch import sketch
from peft_fusion.fusing.weights import stack_rows


def test_every_neuron_is_the_same_combination_of_rows_in_all_tensors():
    weights, width = make(gated=False), 8
    rows = stack_rows(weights, torch.float64)
    normal = torch.randn(NEURONS, width, generator=torch.Generator().manual_seed(3)).double()
    found = stack_rows(sketch(weights, width, seed=3).weights, torch.float64)
    for j in range(width):
        expected = sum(normal[i, j] / width**0.5 * rows[i] for i in range(NEURONS))
        torch.testing.assert_close(found[j], expected)


def test_the_entries_have_mean_zero_and_variance_one_over_c():
    weights = make(gated=False)
    identity = torch.eye(NEURONS, dtype=torch.float64)
    weights = type(weights)((identity,), (None,), identity, None)
    draws = torch.stack([sketch(weights, 10, seed=seed).weights.in_weights[0] for seed in range(200)])
    assert draws.mean().abs() < 0.01 and (draws.var() * 10 - 1).abs() < 0.02


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("keep", [0, 5])
def test_the_linearised_function_is_right_on_average(gated, keep):
    weights, x = make(gated), inputs()
    linear = lambda z: z  # noqa: E731
    expected = run(weights, x, linear)
    outputs = torch.stack([run_narrow(sketch(weights, 20, keep=keep, seed=s), x, linear) for s in range(2000)])
    error = (outputs.mean(0) - expected).norm() / expected.norm()
    spread = (outputs - expected).flatten(1).norm(dim=1).mean() / expected.norm()
    assert error < 3 * spread / 2000**0.5 and error < 0.3


def test_the_top_neurons_are_kept_exactly():
    weights = make(gated=True)
    top = sorted(range(NEURONS), key=lambda i: -float(norm_products(weights)[i]))[:5]
    found = stack_rows(sketch(weights, 8, keep=5).weights, torch.float64)
    rows = stack_rows(weights, torch.float64)
    assert torch.equal(found[:5], torch.stack([rows[i] for i in top]))
    assert min(float((rows - row).norm(dim=1).min()) for row in found[5:]) > 0.1


def test_the_kept_neurons_are_not_sketched_as_well():
    weights = make(gated=False)
    top = norm_products(weights).argmax()
    weights.in_weights[0][top] *= 1e6
    assert sketch(weights, 8, keep=1).weights.in_weights[0][1:].abs().max() < 1e3
    assert sketch(weights, 8, keep=0).weights.in_weights[0].abs().max() > 1e3
    assert weights.in_weights[0].shape == (NEURONS, IN)


@pytest.mark.parametrize("keep", [8, 9, -1])
def test_refuses_to_keep_all_or_fewer_than_none(keep):
    with pytest.raises(ValueError, match=f"`keep` must be 0 to 7 for a width of 8, but got {keep}"):
        sketch(make(gated=False), 8, keep=keep)
