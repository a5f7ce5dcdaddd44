"""k-means++ against the same algorithm by loops over the rows."""

from __future__ import annotations

import math

import pytest
import torch
from by_hand import few, means, partition, problems, product, rows_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_fusion.fusing.cluster.seeding import kmeans_plus_plus


def plus_plus(rows: Tensor, c: int, seed: int) -> Tensor:
    """Greedy k-means++ on the rows, by loops; where fewer rows are distinct than asked for, any that is none yet."""
    trials = 2 + int(math.log(c))
    draws = torch.rand(c, trials, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    nearest, labels = torch.full((len(rows),), torch.inf).double(), torch.zeros(len(rows), dtype=torch.int64)
    centres: list[int] = []
    for cluster in range(c):
        weights = [float(w) for w in nearest] if cluster else [1.0] * len(rows)
        if sum(weights) <= 0:
            weights = [float(row not in centres) for row in range(len(rows))]
        options = []
        for draw in draws[cluster]:
            total, candidate = 0.0, 0
            for row, weight in enumerate(weights):
                total += weight
                if float(draw) * sum(weights) < total:
                    candidate = row
                    break
            distances = torch.minimum((rows - rows[candidate]).square().sum(1), nearest)
            options.append((float(distances.sum()), len(options), candidate, distances))
        _, _, centre, distances = min(options, key=lambda option: option[:2])
        labels[distances < nearest] = cluster
        labels[centre] = cluster
        nearest = distances
        centres.append(centre)
    return labels


@few
@given(problems(largest=30), st.integers(0, 1000))
def test_plus_plus_is_that_of_the_rows(problem, seed):
    rows, c = problem
    found = kmeans_plus_plus(product(rows), c, torch.Generator().manual_seed(seed))
    assert torch.equal(found, plus_plus(rows, c, seed))


@pytest.mark.parametrize("seed", range(5))
def test_plus_plus_gives_every_distinct_row_a_centre_and_then_any(seed):
    rows = rows_of(5, 8, seed=seed)[torch.arange(15) % 5].float()
    gram = product(rows)
    for c in (5, 9, 15):
        labels = kmeans_plus_plus(gram, c, torch.Generator().manual_seed(seed))
        assert sorted(labels.unique().tolist()) == list(range(c))
        assert all(len((torch.tensor(sorted(cluster)) % 5).unique()) == 1 for cluster in partition(labels))


def test_means_of_no_rows_are_none():
    """What the tests above compare with has as many means as clusters."""
    assert means(rows_of(9, 2), torch.arange(9) // 3).shape == (3, 2)
