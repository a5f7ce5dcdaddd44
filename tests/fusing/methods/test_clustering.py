"""The baseline "clustering" against an explicit loop over clusters."""

from __future__ import annotations

import math

import pytest
import torch
from test_fusion import inputs, make, run, run_narrow

from peft_fusion.fusing.methods.clustering import clustering
from peft_fusion.fusing.methods.fusion import fuse
from peft_fusion.fusing.rows import select_rows
from peft_fusion.fusing.weights import stack_rows


def test_each_cluster_is_its_mean_times_the_root_of_its_size():
    weights = make(gated=False)
    rows = stack_rows(weights, torch.float64)
    centroids = stack_rows(fuse(weights, 8).weights, torch.float64)
    nearest = torch.cdist(rows, centroids).argmin(1)
    found = stack_rows(clustering(weights, 8).weights, torch.float64)
    for j in range(8):
        members = [rows[i] for i in range(len(rows)) if nearest[i] == j]
        expected = math.sqrt(len(members)) * sum(members) / len(members)
        torch.testing.assert_close(found[j], expected)


def test_a_linear_ffn_of_duplicates_is_kept_and_a_gelu_one_is_not():
    repeated = select_rows(make(gated=False), torch.arange(40) % 10)
    narrow = clustering(repeated, 10)
    linear = lambda z: z  # noqa: E731
    torch.testing.assert_close(run_narrow(narrow, inputs(), linear), run(repeated, inputs(), linear))
    error = (run_narrow(narrow, inputs()) - run(repeated, inputs())).norm() / run(repeated, inputs()).norm()
    assert error > 0.01


@pytest.mark.parametrize("seed", [0, 1])
def test_a_gated_ffn_has_the_fused_ones_function(seed):
    weights = make(gated=True)
    torch.testing.assert_close(
        run_narrow(clustering(weights, 8, seed=seed), inputs()), run_narrow(fuse(weights, 8, seed=seed), inputs())
    )
