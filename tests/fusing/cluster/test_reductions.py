"""Sums over clusters and minima of matrices, against loops."""

from __future__ import annotations

import torch
from by_hand import few, means, product, random_labels, rows_of
from hypothesis import given
from hypothesis import strategies as st

from peft_fusion.fusing.cluster.reductions import (
    GROUP,
    add_rows,
    cheapest,
    first_rows,
    merge_costs,
    mutual_pairs,
    squared_norms_of_sums,
    sum_by_label,
)

INF = float("inf")


@few
@given(st.integers(1, 200), st.integers(1, 9), st.integers(0, 1000))
def test_cheapest_is_the_first_minimum(c, n, seed):
    costs = torch.randint(0, 6, (c, n), generator=torch.Generator().manual_seed(seed)).float()
    for value, index in (cheapest(costs, 0), cheapest(costs.T.contiguous(), 1)):
        assert value.tolist() == [min(column) for column in costs.T.tolist()]
        assert index.tolist() == [column.index(min(column)) for column in costs.T.tolist()]


def test_cheapest_wherever_it_is():
    """In the first group, in a later one, behind the last whole one; twice; and where there is no whole one."""
    for length in (1, GROUP - 1, GROUP, 3 * GROUP, 3 * GROUP + 5):
        for place in range(0, length, 7):
            costs = torch.full((2, length), INF)
            costs[1] = torch.arange(length, 0, -1).float()
            costs[0, place:] = 2.0
            costs[1, [place, length - 1]] = -1.0
            assert [t.tolist() for t in cheapest(costs, 1)] == [[2.0, -1.0], [place, place]]
            assert [t.tolist() for t in cheapest(costs.T.contiguous(), 0)] == [[2.0, -1.0], [place, place]]


def test_merge_costs_are_wards():
    rows, labels = rows_of(30, 6), random_labels(30, 7, seed=1)
    m, counts = means(rows, labels), torch.bincount(labels).double()
    part = torch.tensor([2, 0, 6])
    found = merge_costs(product(m)[part], m.square().sum(1), 1 / counts, part)
    for row, a in enumerate(part.tolist()):
        for b in range(7):
            expected = counts[a] * counts[b] / (counts[a] + counts[b]) * (m[a] - m[b]).square().sum()
            torch.testing.assert_close(found[row, b], expected if a != b else torch.tensor(INF).double())
    whole = merge_costs(product(m.float()), m.float().square().sum(1), 1 / counts.float(), torch.arange(7))
    assert torch.equal(whole, whole.T)


def test_mutual_pairs_are_named_once_by_their_first():
    nearest = torch.tensor([3, 2, 1, 0, 3, 6, 5, 7])
    assert mutual_pairs(nearest).tolist() == [0, 1, 5]  # 4 is nobody's nearest, and 7 is no pair


@few
@given(st.integers(1, 40), st.integers(0, 1000), st.sampled_from([(), (1,), (3, 2)]))
def test_sums_by_label(n, seed, shape):
    labels = random_labels(n, min(n, 5), seed)
    values = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = sum_by_label(values, labels, 6)
    assert found.shape == (6, *shape) and not found[5].any()
    for label in range(6):
        torch.testing.assert_close(found[label], values[labels == label].sum(0))


def test_rows_are_added_or_subtracted_in_place():
    out, index = torch.ones(3, 2), torch.tensor([2, 0, 2])
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert add_rows(out, index, values) is out and out.tolist() == [[4, 5], [1, 1], [7, 9]]
    assert add_rows(out, index, values, sign=-1).tolist() == [[1, 1], [1, 1], [1, 1]]


@few
@given(st.integers(1, 40), st.integers(0, 1000))
def test_first_rows(n, seed):
    c = min(n, 6)
    labels = random_labels(n, c, seed)
    assert first_rows(labels, c).tolist() == [labels.tolist().index(label) for label in range(c)]


def test_squared_norms_of_sums_do_not_lose_what_float32_rounds_off():
    labels = torch.tensor([0, 1, 0, 0])
    rows = torch.tensor([[1e4, 0.0], [3.0, 4.0], [-1e4, 1e-2], [1.0, 0.0]])
    sums = sum_by_label(product(rows.double()).float(), labels, 2)
    found = squared_norms_of_sums(sums, labels)
    assert found.dtype == torch.float64
    own = [[float(sums[label, row]) for row in range(4) if labels[row] == label] for label in range(2)]
    assert found.tolist() == [sum(values) for values in own]
