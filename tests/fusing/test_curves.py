"""Error curves: what they say is what narrow FFNs of those neurons do, in units that FFNs share."""

from __future__ import annotations

import pytest
import torch
from test_calibrated import DIM, WIDTH, draw, gather, make
from torch.nn.functional import gelu, silu

from peft_fusion.fusing.activations import run
from peft_fusion.fusing.calibrated import fuse_calibrated
from peft_fusion.fusing.curves import _rounds, eliminated
from peft_fusion.fusing.metric import metric
from peft_fusion.fusing.neurons import eliminate, eliminations
from peft_fusion.fusing.recipe import Recipe
from peft_fusion.fusing.settle import settle


def known(gated: bool = True, bias: bool = True, width: int = WIDTH):
    weights, activation = make(gated, bias, width), silu if gated else gelu
    statistics = gather(weights, activation)
    d = draw(50, DIM, seed=7).float() * torch.linspace(0.1, 2, DIM)
    statistics.fisher = d.T @ d
    return weights, statistics, activation


def missed(weights, narrow, statistics, activation) -> float:
    """The error of a narrow FFN on held-out tokens in the metric's own size."""
    x, m = statistics.held_out.double(), metric(statistics.fisher) * float(statistics.fisher.diagonal().mean())
    difference = run(narrow, activation, x) - run(weights, activation, x)
    return float((difference @ m * difference).sum(1).mean())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_error_of_a_narrow_ffn(gated, bias):
    weights, statistics, activation = known(gated, bias)
    errors = eliminated(weights, [4, 8, 12], statistics, activation).errors
    assert list(errors) == [12, 8, 4] and errors[4] > errors[8] > errors[12] > 0
    recipe = settle(Recipe(scale="none"), "data", gradients=True)
    error = missed(weights, fuse_calibrated(weights, 8, statistics, activation, recipe), statistics, activation)
    # the narrow FFN is the best of three choices of neurons, one of which is the elimination's
    assert error <= 1.02 * errors[8]
    assert error >= 0.5 * errors[8]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_narrow_ffns_that_are_kept_err_as_their_curve_says(gated, bias):
    weights, statistics, activation = known(gated, bias)
    found = eliminated(weights, [4, 8, 12], statistics, activation, [8, 12])
    assert list(found.narrow) == [12, 8]
    for width, narrow in found.narrow.items():
        assert narrow.weights.width == width
        assert missed(weights, narrow, statistics, activation) == pytest.approx(found.errors[width], rel=1e-3)


def test_it_grows_with_the_metric():
    weights, statistics, activation = known()
    once = eliminated(weights, [4, 8], statistics, activation).errors
    statistics.fisher = 3 * statistics.fisher
    thrice = eliminated(weights, [4, 8], statistics, activation).errors
    assert {w: e / 3 for w, e in thrice.items()} == pytest.approx(once)


def test_neurons_that_put_out_nothing_cost_nothing():
    weights, statistics, activation = known(bias=False)
    silent = torch.arange(WIDTH) % 2 == 0
    weights.out_weight[silent] = 0
    errors = eliminated(weights, [WIDTH // 2 - 2, WIDTH // 2, WIDTH - 2], statistics, activation).errors
    assert errors[WIDTH // 2] < 1e-4 * errors[WIDTH // 2 - 2]
    assert errors[WIDTH - 2] < 1e-4 * errors[WIDTH // 2 - 2]


def test_gradients_are_needed():
    weights, statistics, activation = known()
    statistics.fisher = None
    with pytest.raises(ValueError, match="needs gradients"):
        eliminated(weights, [4], statistics, activation)


def test_an_elimination_passes_through_every_width():
    rounds = _rounds(1536, [192, 768, 1152])
    assert rounds == sorted(set(rounds), reverse=True) and {192, 768, 1152} <= set(rounds) and rounds[-1] == 192
    assert all(b >= 0.89 * a for a, b in zip([1536, *rounds], rounds, strict=False))


def test_eliminate_is_the_end_of_its_rounds():
    hidden, out = draw(100, WIDTH, seed=1), draw(WIDTH, DIM, seed=2)
    moment = hidden.T @ hidden / 100
    steps = list(eliminations(moment.clone(), out, [12, 8, 4]))
    assert [len(left) for left in steps] == [12, 8, 4]
    assert all(set(b.tolist()) < set(a.tolist()) for a, b in zip(steps, steps[1:], strict=False))
    assert eliminate(moment.clone(), out, 4).shape == (4,)
    assert eliminate(moment.clone(), out, WIDTH).tolist() == list(range(WIDTH))
