"""The out-projection fitted anew: against least squares, and on neurons that make the equations singular."""

from __future__ import annotations

import pytest
import torch
from test_calibrated import DIM, WIDTH, draw, gather, make, outputs, plain, settled
from torch import Tensor
from torch.nn.functional import gelu, silu

from peft_fusion.fusing import refit as module
from peft_fusion.fusing.activations import look_inside
from peft_fusion.fusing.calibrated import fuse_calibrated
from peft_fusion.fusing.held_out import HeldOut
from peft_fusion.fusing.moments import Moments
from peft_fusion.fusing.refit import Problem, refit
from peft_fusion.fusing.weights import FFNWeights, cast


def kept_moments(hidden: Tensor, out_weight: Tensor, kept: Tensor, bias: bool) -> Moments:
    outputs = hidden @ out_weight
    moments = moments_of(hidden[:, kept], outputs)
    return moments if bias else moments.about_zero()


def moments_of(hidden: Tensor, outputs: Tensor) -> Moments:
    return HeldOut.of(hidden.clone(), outputs).moments()


def problem(moments: Moments, prior: Tensor, hidden: Tensor, outputs: Tensor) -> Problem:
    return Problem(moments, prior, HeldOut.of(hidden.clone(), outputs))


@pytest.mark.parametrize("bias", [False, True])
def test_the_refit_is_least_squares_where_nothing_is_shrunk(bias, monkeypatch):
    monkeypatch.setattr("peft_fusion.fusing.refit.STRENGTHS", (1e-12,))
    weights, x = make(gated=False, bias=True), draw(500, DIM, seed=5)
    hidden = look_inside(weights, gelu, x).hidden
    kept, y = torch.arange(0, WIDTH, 2), hidden @ weights.out_weight
    moments = kept_moments(hidden, weights.out_weight, kept, bias)
    fit = refit(problem(moments, weights.out_weight[kept], hidden[:, kept], y))
    columns = hidden[:, kept]
    if bias:
        columns = torch.cat([columns, torch.ones_like(columns[:, :1])], dim=1)
    expected = torch.linalg.lstsq(columns, y).solution
    torch.testing.assert_close(fit.out_weight, expected[: len(kept)], rtol=1e-6, atol=1e-8)
    assert (fit.bias_change is None) == (not bias)
    if fit.bias_change is not None:
        torch.testing.assert_close(fit.bias_change, expected[-1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bias", [False, True])
def test_the_refit_is_where_the_slope_of_what_it_minimises_is_nothing(bias, monkeypatch):
    monkeypatch.setattr("peft_fusion.fusing.refit.STRENGTHS", (0.1,))
    weights, x = make(gated=False), draw(500, DIM, seed=5)
    hidden = look_inside(weights, gelu, x).hidden
    kept, y = torch.arange(0, WIDTH, 2), hidden @ weights.out_weight
    g, prior = hidden[:, kept], weights.out_weight[kept]
    fit = refit(problem(kept_moments(hidden, weights.out_weight, kept, bias), prior, g, y))
    residual = g @ fit.out_weight - y
    if bias:
        residual = residual + fit.bias_change
        torch.testing.assert_close(residual.mean(0), torch.zeros(DIM).double(), rtol=0, atol=1e-9)
        g = g - g.mean(0)
    slope = g.T @ residual / len(x) + 0.1 * g.square().mean(0).unsqueeze(1) * (fit.out_weight - prior)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)


def test_a_refit_that_does_harm_on_held_out_tokens_is_not_taken():
    weights = make(gated=False)
    x = draw(200, DIM, seed=6)
    hidden, kept = look_inside(weights, gelu, x).hidden, torch.arange(8)
    noise = draw(12, WIDTH, seed=7) * 5  # what was accumulated has nothing to do with what is held out
    moments = kept_moments(noise, weights.out_weight, kept, bias=False)
    prior = torch.linalg.lstsq(hidden[:, kept], hidden @ weights.out_weight).solution
    fit = refit(problem(moments, prior, hidden[:, kept], hidden @ weights.out_weight))
    assert fit.strength == float("inf")
    torch.testing.assert_close(fit.out_weight, prior)


def test_a_strength_whose_equations_cannot_be_solved_is_left_out(monkeypatch):
    weights, x = make(gated=False), draw(200, DIM, seed=6)
    hidden, kept = look_inside(weights, gelu, x).hidden, torch.arange(8)
    arguments = (
        kept_moments(hidden, weights.out_weight, kept, bias=True),
        weights.out_weight[kept],
        hidden[:, kept],
        hidden @ weights.out_weight,
    )
    assert refit(problem(*arguments)).strength == 0.003
    solve = torch.linalg.cholesky_ex

    def solved(matrix, *, out):
        weak = bool(matrix[0, 0] < 1.02)
        solve(matrix, out=out)
        out[1].fill_(int(weak))

    monkeypatch.setattr(torch.linalg, "cholesky_ex", solved)
    assert refit(problem(*arguments)).strength == 0.03


def odd(weights: FFNWeights, activation, kind: str) -> FFNWeights:
    """An FFN of which one neuron makes the equations singular."""
    ins, biases, out = [w.clone() for w in weights.in_weights], list(weights.in_biases), weights.out_weight.clone()
    if kind == "constant":
        for k, value in enumerate((3.0, 5.0)[: len(ins)]):
            ins[k][2], biases[k] = 0, biases[k].clone()
            biases[k][2] = value
    elif kind == "dead":
        ins[-1][2], biases[-1] = 0, biases[-1].clone()
        biases[-1][2] = 0
    elif kind == "duplicate":
        for k in range(len(ins)):
            ins[k][2], biases[k] = ins[k][3], biases[k].clone()
            biases[k][2] = biases[k][3]
    else:
        ins[-1][2] *= float(kind)
        biases[-1] = biases[-1].clone()
        biases[-1][2] *= float(kind)
        out[2] /= float(kind)
    return FFNWeights(tuple(ins), tuple(biases), out, weights.out_bias)


@pytest.mark.parametrize("kind", ["constant", "dead", "duplicate", "1e4", "1e-4"])
@pytest.mark.parametrize(("gated", "activation"), [(False, gelu), (True, silu)])
@pytest.mark.parametrize("representative", ["neuron", "centroid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odd_neurons_are_refitted_like_any(kind, gated, activation, representative, dtype):
    weights = cast(odd(make(gated, bias=True), activation, kind), dtype)
    statistics, x = gather(weights, activation, 4000), draw(1000, DIM, seed=50)
    goal = outputs(plain(cast(weights, torch.float64)), activation, x)
    errors = {}
    for how in ("ridge", "none"):
        recipe = settled(statistics, representative=representative, refit=how, scale="none")
        narrow = fuse_calibrated(weights, 10, statistics, activation, recipe).folded()
        found = outputs(plain(cast(narrow, torch.float64)), activation, x)
        errors[how] = float((found - goal).square().mean() / goal.var(0).mean())
    assert errors["ridge"] < 0.9 * errors["none"]
    if representative == "neuron":
        assert errors["ridge"] < 0.5


@pytest.mark.parametrize("size", [1e-6, 1e4, 1e12])
def test_a_neurons_size_does_not_matter_to_the_others(size):
    """The prior's pull is relative to each neuron's own variance, the equations' conditioning too."""
    weights, kept = make(False, True), torch.arange(0, WIDTH, 2)
    hidden = look_inside(weights, gelu, draw(500, DIM, seed=5)).hidden
    found = []
    for factor in (1.0, size):
        scaled, out = hidden.clone(), weights.out_weight.clone()
        scaled[:, 2] *= factor
        out[2] /= factor
        g = scaled[:, kept]
        fit = refit(problem(kept_moments(scaled, out, kept, bias=True), out[kept], g, scaled @ out))
        fit.out_weight[1] *= factor
        found.append(fit.out_weight)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [8, 16, 24, 40, 100, 300])
def test_the_strength_is_the_best_of_all_though_not_all_are_tried(tokens, monkeypatch):
    weights, kept = make(gated=False), torch.arange(0, WIDTH, 2)
    few, others = (look_inside(weights, gelu, draw(n, DIM, seed=n)).hidden for n in (tokens, 2000))
    moments = kept_moments(few, weights.out_weight, kept, bias=False)
    arguments = moments, weights.out_weight[kept], others[:, kept], others @ weights.out_weight
    tried = []
    original = Problem.fit
    monkeypatch.setattr(Problem, "fit", lambda self, strength: tried.append(strength) or original(self, strength))
    found = refit(problem(*arguments))
    errors = {strength: original(problem(*arguments), strength).error for strength in module.STRENGTHS}
    assert found.error == min(errors.values()) == errors[found.strength] and len(tried) < len(errors)


def test_problems_are_compared_by_one_fit_or_by_none_if_that_is_better():
    weights, x = make(gated=False), draw(500, DIM, seed=5)
    hidden, kept = look_inside(weights, gelu, x).hidden, torch.arange(0, WIDTH, 2)
    moments = kept_moments(hidden, weights.out_weight, kept, bias=False)
    found = problem(moments, weights.out_weight[kept], hidden[:, kept], hidden @ weights.out_weight)
    assert found.promise == found.fit(0.1).error < found.unfitted.error
    noise = draw(12, WIDTH, seed=7) * 5  # what was accumulated has nothing to do with what is held out
    harm = Problem(kept_moments(noise, weights.out_weight, kept, bias=False), refit(found).out_weight, found.held_out)
    assert harm.promise == harm.unfitted.error < harm.fit(0.1).error
