"""Calibrated fusion on small tensors: kernels, the choice of real neurons, the refit, the tangent scales."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from peft_fusion.fusing import calibrated
from peft_fusion.fusing.activations import look_inside
from peft_fusion.fusing.calibrated import fuse_calibrated
from peft_fusion.fusing.kernels import ntk_kernel, output_kernel, weight_kernel
from peft_fusion.fusing.metric import FLATTENING, metric_root
from peft_fusion.fusing.neurons import eliminate, most_salient_of_each
from peft_fusion.fusing.recipe import Recipe
from peft_fusion.fusing.settle import settle
from peft_fusion.fusing.statistics import FFNStatistics
from peft_fusion.fusing.weights import FFNWeights, NarrowFFN

DIM, WIDTH = 6, 16


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(gated: bool, bias: bool = False, width: int = WIDTH) -> FFNWeights:
    ins = tuple(draw(width, DIM, seed=k) for k in range(2 if gated else 1))
    biases = tuple(draw(width, seed=10 + k) if bias else None for k in range(len(ins)))
    return FFNWeights(ins, biases, draw(width, DIM, seed=20), draw(DIM, seed=30) if bias else None)


def gather(weights: FFNWeights, activation, tokens: int = 400) -> FFNStatistics:
    statistics = FFNStatistics(weights.width, DIM)
    statistics.add(look_inside(weights, activation, draw(tokens, DIM, seed=40)).hidden)
    statistics.hold_out(draw(200, DIM, seed=41).float())
    return statistics


def settled(statistics: FFNStatistics, **settings) -> Recipe:
    """The recipe that these settings come to after a calibration."""
    return settle(Recipe(**settings), "data", statistics.fisher is not None)


def outputs(narrow: NarrowFFN, activation, x: Tensor) -> Tensor:
    """The narrow FFN written out: scales before and after the activation stand alone."""
    w = narrow.weights
    scales = narrow.in_scales or (1.0,) * len(w.in_weights)
    pairs = zip(w.in_weights, w.in_biases, scales, strict=True)
    z = [(x @ a.T + (0 if b is None else b)) * t for a, b, t in pairs]
    hidden = activation(z[0]) * (z[1] if w.gated else 1)
    return (hidden * narrow.scale) @ w.out_weight + (0 if w.out_bias is None else w.out_bias)


def plain(weights: FFNWeights) -> NarrowFFN:
    return NarrowFFN(weights, torch.ones(weights.width, dtype=torch.float64))


def rescaled(weights: FFNWeights, factor: Tensor) -> FFNWeights:
    ins = (*weights.in_weights[:-1], weights.in_weights[-1] * factor.unsqueeze(1))
    return FFNWeights(ins, weights.in_biases, weights.out_weight / factor.unsqueeze(1), weights.out_bias)


@pytest.mark.parametrize("gated, activation, homogeneity", [(True, silu, None), (False, relu, 1)])
def test_kernels_do_not_see_a_rescaling_that_leaves_the_function(gated, activation, homogeneity):
    weights, x = make(gated), draw(300, DIM, seed=5)
    factor = draw(WIDTH, seed=6).abs() + 0.5
    factor = torch.where(draw(WIDTH, seed=7) < 0, -factor, factor) if gated else factor
    kernels = []
    for version in (weights, rescaled(weights, factor)):
        hidden = look_inside(version, activation, x).hidden
        moment = hidden.T @ hidden / len(x)
        kernels.append(
            (
                weight_kernel(version, homogeneity),
                output_kernel(version.out_weight, moment),
                ntk_kernel(version, moment.clone(), x, activation, homogeneity),
            )
        )
    for one, other in zip(*kernels, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # balanced in float32


def test_the_output_kernel_is_the_inner_product_of_outputs():
    weights, x = make(gated=True), draw(50, DIM, seed=5)
    hidden = look_inside(weights, silu, x).hidden
    rows = hidden.T.unsqueeze(2) * weights.out_weight.unsqueeze(1)  # (neurons, tokens, out)
    expected = rows.flatten(1) @ rows.flatten(1).T / len(x)
    torch.testing.assert_close(output_kernel(weights.out_weight, hidden.T @ hidden / len(x)), expected)


def test_the_fisher_kernel_is_the_inner_product_of_outputs_in_its_metric():
    weights, x, a = make(gated=True), draw(50, DIM, seed=5), draw(DIM, DIM, seed=6)
    hidden = look_inside(weights, silu, x).hidden
    metric = a @ a.T
    rows = hidden.T.unsqueeze(2) * weights.out_weight.unsqueeze(1)  # (neurons, tokens, out)
    expected = torch.einsum("ito,op,jtp->ij", rows, metric, rows) / len(x)
    scale = metric.diagonal().mean()
    flat = FLATTENING * output_kernel(weights.out_weight, hidden.T @ hidden / len(x))
    found = output_kernel(weights.out_weight @ metric_root(metric), hidden.T @ hidden / len(x))
    torch.testing.assert_close(found, expected / scale + flat)


@pytest.mark.parametrize("gated, activation, bias", [(False, gelu, False), (False, gelu, True), (True, silu, False)])
def test_what_predictions_depend_on_is_kept_best(gated, activation, bias):
    weights, x = make(gated, bias), draw(1000, DIM, seed=50)
    goal = outputs(plain(weights), activation, x)
    errors = {}
    for kernel in ("outputs", "fisher"):
        statistics = gather(weights, activation, 4000)
        statistics.fisher = torch.diag(torch.eye(DIM)[0])  # only the first of the outputs is looked at
        narrow = fuse_calibrated(weights, 5, statistics, activation, settled(statistics, kernel=kernel))
        errors[kernel] = (outputs(narrow, activation, x) - goal).square().mean(0)
    assert float(errors["fisher"][0]) < 0.7 * float(errors["outputs"][0])
    assert float(errors["fisher"].sum()) > float(errors["outputs"].sum())


def test_the_fisher_kernel_needs_gradients():
    statistics = gather(make(gated=True), silu)
    recipe = settle(Recipe(kernel="fisher"), "data", gradients=True)
    with pytest.raises(ValueError, match="needs gradients, and these statistics have none"):
        fuse_calibrated(make(gated=True), 8, statistics, silu, recipe)


@pytest.mark.parametrize("width", [6, 3])
def test_elimination_removes_the_neuron_whose_refit_costs_least(width, monkeypatch):
    monkeypatch.setattr("peft_fusion.fusing.neurons.SHRINKAGE", 0.0)
    monkeypatch.setattr("peft_fusion.fusing.neurons.ROUNDS", 1000)  # one neuron a round
    hidden, out = draw(100, 7, seed=1) @ draw(7, 7, seed=2), draw(7, 4, seed=3)

    def cost(kept: tuple[int, ...]) -> float:
        own = hidden[:, list(kept)]
        fit = torch.linalg.lstsq(own, hidden @ out).solution
        return float((own @ fit - hidden @ out).square().sum())

    kept = tuple(range(7))
    while len(kept) > width:
        kept = min(itertools.combinations(kept, len(kept) - 1), key=cost)
    assert eliminate(hidden.T @ hidden / 100, out, width).tolist() == list(kept)


@pytest.mark.parametrize("width", [96, 24])
def test_elimination_in_float32_is_as_good_as_in_float64(width):
    """Of strongly correlated activations of very different sizes, where rounding would show."""
    hidden = draw(600, 40, seed=1) @ draw(40, 192, seed=2) + 0.01 * draw(600, 192, seed=3)
    hidden = (hidden * torch.logspace(-3, 1, 192)).double()
    out = draw(192, 16, seed=4).double()

    def error(dtype: torch.dtype) -> float:
        kept = eliminate((hidden.T @ hidden / 600).to(dtype), out, width)
        fitted = torch.linalg.lstsq(hidden[:, kept], hidden @ out).solution
        return float((hidden[:, kept] @ fitted - hidden @ out).norm())

    assert error(torch.float32) == pytest.approx(error(torch.float64), rel=0.02)


def test_elimination_drops_what_others_make_up_for_and_not_what_is_small():
    hidden = draw(200, 4, seed=1)
    hidden = torch.cat([hidden, hidden[:, :1] * 3, hidden[:, 1:2] * 0.2], dim=1)  # 4 repeats 0, 5 repeats 1
    out = torch.ones(6, 1, dtype=torch.float64)
    kept = eliminate(hidden.T @ hidden / 200, out, 4).tolist()
    assert {2, 3} <= set(kept) and len({0, 4} & set(kept)) == 1 and len({1, 5} & set(kept)) == 1


def test_one_neuron_of_each_cluster_the_most_salient():
    saliency = torch.tensor([1.0, 5.0, 2.0, 7.0, 3.0])
    labels = torch.tensor([0, 0, 1, 2, 1])
    assert most_salient_of_each(saliency, labels, 3).tolist() == [1, 4, 3]


@pytest.mark.parametrize("representative", ["neuron", "centroid"])
@pytest.mark.parametrize("gated, activation, bias", [(False, gelu, True), (True, silu, False)])
def test_at_full_width_nothing_changes(gated, activation, bias, representative):
    weights = make(gated, bias)
    statistics, x = gather(weights, activation), draw(50, DIM, seed=9)
    recipe = settled(statistics, representative=representative)
    narrow = fuse_calibrated(weights, WIDTH, statistics, activation, recipe)
    goal = outputs(plain(weights), activation, x)
    torch.testing.assert_close(outputs(narrow, activation, x), goal, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gated, activation, bias", [(False, gelu, True), (True, silu, False)])
def test_the_refit_lowers_the_error_on_other_tokens(gated, activation, bias):
    weights = make(gated, bias)
    statistics, x = gather(weights, activation, 4000), draw(1000, DIM, seed=50)
    goal = outputs(plain(weights), activation, x)
    errors = []
    for refit_kind in ("ridge", "none"):
        narrow = fuse_calibrated(weights, 8, statistics, activation, settled(statistics, refit=refit_kind))
        errors.append(float((outputs(narrow, activation, x) - goal).square().mean()))
    assert errors[0] < 0.8 * errors[1]


def test_statistics_of_another_ffn_are_refused():
    statistics = gather(make(gated=True, width=8), silu)
    with pytest.raises(ValueError, match="Calibrate again"):
        fuse_calibrated(make(gated=True), 8, statistics, silu, settled(statistics))


@pytest.mark.parametrize("refit", ["ridge", "none"])
def test_the_candidate_of_the_lowest_held_out_error_wins(monkeypatch, refit):
    weights = make(False)
    statistics = gather(weights, gelu)
    hidden = look_inside(weights, gelu, statistics.held_out.double()).hidden
    order = (hidden.square().mean(0) * weights.out_weight.square().sum(1)).argsort()
    worst, best = order[:5].sort().values, order[-5:].sort().values
    for candidates in ([worst, best], [best, worst]):
        monkeypatch.setattr(calibrated, "_candidates", lambda *_, found=candidates: found)
        narrow = fuse_calibrated(weights, 5, statistics, gelu, settled(statistics, refit=refit, scale="none"))
        assert torch.equal(narrow.weights.in_weights[0], weights.in_weights[0][best])
