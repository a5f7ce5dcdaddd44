"""The baseline "mmd": its objective against explicit loops, and that it is brought down."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from test_fusion import NEURONS, inputs, make, run, run_narrow

from peft_fusion.fusing.methods.mmd import discrepancy, fit_particles, median_squared_distance, mmd, squared_distances
from peft_fusion.fusing.rows import select_rows
from peft_fusion.fusing.weights import stack_rows


def kernel_mean(a: torch.Tensor, b: torch.Tensor, bandwidth: float) -> float:
    total = 0.0
    for x in a:
        for y in b:
            total += math.exp(-float(((x - y) ** 2).sum()) / bandwidth)
    return total / (len(a) * len(b))


def test_the_objective_is_the_discrepancy():
    rows = stack_rows(make(gated=False), torch.float64)
    particles = rows[:7] + 0.3
    expected = kernel_mean(particles, particles, 5.0) - 2 * kernel_mean(particles, rows, 5.0)
    assert float(discrepancy(rows, particles, 5.0)) == pytest.approx(7 * expected)


def test_the_bandwidth_is_the_median_squared_distance():
    rows = stack_rows(make(gated=False), torch.float64)
    distances = sorted(float(((x - y) ** 2).sum()) for x, y in combinations(rows, 2))
    assert median_squared_distance(rows) == pytest.approx(distances[(len(distances) - 1) // 2])


def test_particles_come_closer_to_the_rows_than_any_random_subset():
    rows = stack_rows(make(gated=False), torch.float64)
    bandwidth = median_squared_distance(rows)

    def squared_mmd(particles: torch.Tensor) -> float:
        return float(discrepancy(rows, particles, bandwidth)) / len(particles) + kernel_mean(rows, rows, bandwidth)

    subsets = [torch.randperm(NEURONS, generator=torch.Generator().manual_seed(s))[:8] for s in range(200)]
    best = min(squared_mmd(rows[subset]) for subset in subsets)
    fitted = squared_mmd(fit_particles(rows, rows[subsets[0]], 100, 0.1))
    assert 0 < fitted < 0.5 * best


def test_without_steps_it_is_a_subset_whose_linear_part_is_scaled_up():
    weights = make(gated=False)
    start = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(4))[:8].sort().values
    linear = lambda z: z  # noqa: E731
    found = run_narrow(mmd(weights, 8, steps=0, seed=4), inputs(), linear) - weights.out_bias
    subset = run(select_rows(weights, start), inputs(), linear) - weights.out_bias
    torch.testing.assert_close(found, NEURONS / 8 * subset)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_the_size_of_the_weights_does_not_matter(size):
    rows = stack_rows(make(gated=False), torch.float32)
    moved = fit_particles(rows * size, rows[:8] * size, 20, 0.1) / size
    torch.testing.assert_close(moved, fit_particles(rows, rows[:8], 20, 0.1), rtol=1e-2, atol=1e-2)
    assert (moved - rows[:8]).norm() > 0.1


def test_equal_rows_stay():
    rows = torch.ones(10, 4)
    assert torch.equal(fit_particles(rows, rows[:3], 5, 0.1), rows[:3])
    assert torch.equal(fit_particles(0 * rows, 0 * rows[:3], 5, 0.1), 0 * rows[:3])


def test_fits_under_no_grad_and_refuses_fewer_than_no_steps():
    with torch.no_grad():
        moved = mmd(make(gated=True), 8)
    torch.testing.assert_close(stack_rows(moved.weights), stack_rows(mmd(make(gated=True), 8).weights))
    with pytest.raises(ValueError, match="`steps` must be at least 0, but got -1"):
        mmd(make(gated=True), 8, steps=-1)


def test_squared_distances_are_those_of_cdist():
    rows = stack_rows(make(gated=False), torch.float64)
    torch.testing.assert_close(squared_distances(rows, rows[:5]), torch.cdist(rows, rows[:5]) ** 2)
