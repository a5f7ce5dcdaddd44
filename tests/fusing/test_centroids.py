"""Centroids refitted to all training tokens by a second pass over them."""

from __future__ import annotations

import pytest
import torch
from test_calibrated import DIM, draw, gather, make, outputs, plain, settled
from torch.nn.functional import gelu, silu

from peft_fusion.fusing.activations import hidden_activations
from peft_fusion.fusing.calibrated import cluster_centroids, fuse_calibrated
from peft_fusion.fusing.centroids import CentroidMoments, refit_to
from peft_fusion.fusing.held_out import HeldOut
from peft_fusion.fusing.metric import in_metric, metric_root, out_of_metric
from peft_fusion.fusing.moments import MomentSums
from peft_fusion.fusing.weights import FFNWeights

NARROW = 6
KINDS = [(False, gelu, True), (True, silu, False)]


def prepared(gated, activation, bias, kernel="outputs"):
    weights = make(gated, bias)
    statistics = gather(weights, activation)
    d = draw(50, DIM, seed=8).float() * torch.logspace(0, -1, DIM)
    statistics.fisher = d.T @ d
    recipe = settled(statistics, kernel=kernel, representative="centroid", scale="counts")
    return weights, statistics, recipe


@pytest.mark.parametrize(("gated", "activation", "bias"), KINDS)
def test_what_centroids_do_is_summed_up_over_all_tokens(gated, activation, bias):
    weights, statistics, recipe = prepared(gated, activation, bias)
    narrow = cluster_centroids(weights, NARROW, statistics, activation, recipe)
    assert float(narrow.scale.sum()) == weights.width
    moments, x = CentroidMoments(weights, narrow, activation), draw(600, DIM, seed=3)
    for part in x.split(250):
        moments.add_inputs(part)
    g = hidden_activations(narrow.weights, activation, x) * narrow.scale
    y = hidden_activations(weights, activation, x) @ weights.out_weight
    expected = torch.cat([g, y], dim=1).T.cov(correction=0)
    found = moments.moments()
    torch.testing.assert_close(found.gram, expected[:NARROW, :NARROW], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.cross, expected[:NARROW, NARROW:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mean_out, y.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ["outputs", "fisher"])
@pytest.mark.parametrize(("gated", "activation", "bias"), KINDS)
def test_the_more_tokens_centroids_are_refitted_to_the_better(gated, activation, bias, kernel):
    weights, statistics, recipe = prepared(gated, activation, bias, kernel)
    x, goal = draw(2000, DIM, seed=50), None
    root = metric_root(statistics.fisher.double()) if kernel == "fisher" else None
    goal = outputs(plain(weights), activation, x)

    def error(inputs) -> float:
        moments = None
        if inputs is not None:
            narrow = cluster_centroids(weights, NARROW, statistics, activation, recipe)
            moments = CentroidMoments(weights, narrow, activation)
            moments.add_inputs(inputs)
        found = fuse_calibrated(weights, NARROW, statistics, activation, recipe, centroids=moments)
        missed = in_metric(outputs(found, activation, x) - goal, root)
        return float(missed.square().sum() / in_metric(goal, root).square().sum())

    few, many = error(draw(20, DIM, seed=3)), error(draw(8000, DIM, seed=3))
    assert many < few
    assert many < error(None)  # 100 held-out tokens


def test_the_clusters_are_those_of_one_pass():
    weights, statistics, recipe = prepared(*KINDS[0])
    narrow = cluster_centroids(weights, NARROW, statistics, gelu, recipe)
    moments = CentroidMoments(weights, narrow, gelu)
    moments.add_inputs(draw(500, DIM, seed=3))
    found = fuse_calibrated(weights, NARROW, statistics, gelu, recipe, centroids=moments)
    other = fuse_calibrated(weights, NARROW, statistics, gelu, recipe)
    assert torch.equal(found.scale, narrow.scale) and torch.equal(found.scale, other.scale)
    for narrow_in, found_in, other_in in zip(
        narrow.weights.in_weights, found.weights.in_weights, other.weights.in_weights, strict=True
    ):
        assert torch.equal(found_in, narrow_in) and torch.equal(other_in, narrow_in)
    assert not torch.equal(found.weights.out_weight, other.weights.out_weight)


@pytest.mark.parametrize("bias", [False, True])
def test_the_refit_is_least_squares_over_the_tokens(bias, monkeypatch):
    """With its scale, and the same whatever the metric: every output has weights of its own."""
    monkeypatch.setattr("peft_fusion.fusing.refit.STRENGTHS", (1e-12,))
    weights, statistics, recipe = prepared(False, gelu, bias)
    narrow, x = cluster_centroids(weights, NARROW, statistics, gelu, recipe), draw(500, DIM, seed=3)
    g = hidden_activations(narrow.weights, gelu, x) * narrow.scale
    y = hidden_activations(weights, gelu, x) @ weights.out_weight
    columns = torch.cat([g, torch.ones_like(g[:, :1])], dim=1) if bias else g
    expected = torch.linalg.lstsq(columns, y).solution
    for root in (None, metric_root(statistics.fisher.double())):
        training, held_out = MomentSums(NARROW, DIM, dtype=torch.float64), HeldOut.of(g.clone(), in_metric(y, root))
        training.add(g, y)
        found = refit_to(narrow, training.moments(), held_out, root)
        torch.testing.assert_close(found.weights.out_weight, expected[:NARROW], rtol=1e-6, atol=1e-8)
        if bias:
            torch.testing.assert_close(found.weights.out_bias, weights.out_bias + expected[-1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_that_of_the_result_only(dtype):
    weights, statistics, recipe = prepared(*KINDS[1])
    weights = FFNWeights(
        tuple(w.to(dtype) for w in weights.in_weights), (None, None), weights.out_weight.to(dtype), None
    )
    narrow = cluster_centroids(weights, NARROW, statistics, silu, recipe)
    assert narrow.weights.out_weight.dtype == torch.float32
    moments = CentroidMoments(weights, narrow, silu)
    moments.add_inputs(draw(500, DIM, seed=3).to(dtype))
    found = fuse_calibrated(weights, NARROW, statistics, silu, recipe, centroids=moments)
    assert {block.dtype for block in found.weights.blocks()} == {dtype}


def test_out_of_metric_is_the_inverse():
    root = metric_root(draw(DIM, DIM, seed=1) @ draw(DIM, DIM, seed=1).T)
    value = draw(4, DIM, seed=2)
    for given in (value, value[0]):
        torch.testing.assert_close(out_of_metric(in_metric(given, root), root), given)
    assert out_of_metric(value, None) is value
