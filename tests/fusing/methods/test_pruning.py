"""The baseline "pruning" against explicit loops over neurons."""

from __future__ import annotations

import pytest
import torch
from test_fusion import NEURONS, make

from peft_fusion.fusing.methods.pruning import keep_best, norm_products, pruning
from peft_fusion.fusing.weights import stack_rows


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("width", [1, 8, 39])
def test_keeps_the_neurons_of_the_largest_norm_products(gated, width):
    weights = make(gated)
    products = []
    for i in range(NEURONS):
        product = 1.0
        for matrix in (*weights.in_weights, weights.out_weight):
            product *= sum(float(v) ** 2 for v in matrix[i]) ** 0.5
        products.append(product)
    torch.testing.assert_close(norm_products(weights), torch.tensor(products, dtype=torch.float64))
    best = sorted(sorted(range(NEURONS), key=lambda i: -products[i])[:width])
    rows = stack_rows(weights, torch.float64)
    found = stack_rows(pruning(weights, width).weights, torch.float64)
    assert torch.equal(found, torch.stack([rows[i] for i in best]))


def test_given_scores_decide_and_the_first_of_equal_ones_stays():
    weights = make(gated=True)
    scores = torch.zeros(NEURONS)
    scores[[30, 7]] = 1
    found = stack_rows(keep_best(weights, 4, scores).weights, torch.float64)
    assert torch.equal(found, stack_rows(weights, torch.float64)[[0, 1, 7, 30]])


def test_norms_of_float16_weights_do_not_overflow():
    weights = make(gated=True, dtype=torch.float16)
    weights.in_weights[0].mul_(1e4)
    assert bool(norm_products(weights).isfinite().all())


def test_refuses_scores_of_another_shape_or_that_are_not_finite():
    weights = make(gated=False)
    with pytest.raises(ValueError, match=r"one number for each of the 40 neurons, but its shape is \(39,\)"):
        keep_best(weights, 8, torch.ones(39))
    with pytest.raises(ValueError, match="NaN"):
        keep_best(weights, 8, torch.full((NEURONS,), torch.nan))
