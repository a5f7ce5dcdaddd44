"""Agglomeration against what its merges make of the rows."""

from __future__ import annotations

import pytest
import torch
from by_hand import partition, product, rows_of
from torch import Tensor

from peft_fusion.fusing.cluster import ward as module
from peft_fusion.fusing.cluster.ward import _Forest, _merge_duplicates, _split, ward


def forget_tiles(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Has the work done so few rows at a time that small inputs take several turns."""
    monkeypatch.setattr(module, "_tile", lambda gram: rows)


# --------------------------------------------------------------------------------------------------------- duplicates


def by_equality(rows: Tensor) -> list[int]:
    """The number of each row's kind, in the order of the kinds' first rows."""
    kinds: list[list[float]] = []
    for row in rows.tolist():
        if row not in kinds:
            kinds.append(row)
    return [kinds.index(row) for row in rows.tolist()]


@pytest.mark.parametrize("tile", [1, 3, 1000])
def test_equal_rows_share_a_label(tile, monkeypatch):
    forget_tiles(monkeypatch, tile)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        rows = rows_of(8, 5, seed=seed)[torch.randint(8, (17,), generator=generator)]
        for gram in (product(rows), product(rows).float()):
            assert _merge_duplicates(gram).tolist() == by_equality(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_duplicates_are_told_from_near_ones_by_rounding_alone(dtype):
    """Of rows that differ in the last bits the Gram matrix tells nothing; a thousand times that, it does."""
    eps = torch.finfo(dtype).eps
    row = rows_of(1, 40)
    for difference, kinds in ((0.5 * eps, 1), (1000 * eps**0.5, 2)):
        rows = torch.cat([row, row * (1 + difference), -row])
        assert len(_merge_duplicates(product(rows.to(dtype))).unique()) == kinds + 1


@pytest.mark.parametrize("tile", [1, 2, 1000])
def test_a_chain_of_equal_rows_has_one_label(tile, monkeypatch):
    """Rounding may make 2 equal to 1 and 1 to 0, but not 2 to 0."""
    forget_tiles(monkeypatch, tile)
    gram = 1.0 - torch.tensor([[0, 1, 4, 50], [1, 0, 1, 50], [4, 1, 0, 50], [50, 50, 50, 0]]) * 1e-7 * 20
    noise = module.DUPLICATE * torch.finfo(torch.float32).eps
    margins = 2 * (1 - noise) - 2 * gram
    assert margins[0, 1] <= 0 < margins[0, 2]  # what is meant to be tested
    assert _merge_duplicates(gram).tolist() == [0, 0, 0, 1]


def test_zero_rows_are_equal_to_each_other_alone():
    rows = torch.cat([torch.zeros(2, 3), 1e-10 * torch.eye(3), torch.zeros(1, 3)])
    assert _merge_duplicates(product(rows)).tolist() == [0, 0, 1, 2, 3, 0]


def test_rows_leave_a_label_that_they_share_and_no_more_than_needed():
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    assert _split(labels, 0).tolist() == labels.tolist()
    assert _split(labels, 2).tolist() == [0, 1, 3, 2, 4, 0]
    assert _split(labels, 3).tolist() == [0, 1, 3, 2, 4, 5]


# ------------------------------------------------------------------------------------------------------ agglomeration


def check_forest(forest: _Forest, rows: Tensor) -> None:
    """All that it holds of the clusters that are left is what the rows say."""
    alive = (forest.penalty == 0).nonzero().squeeze(1)
    assert sorted(forest.labels.unique().tolist()) == alive.tolist()
    m = torch.stack([rows[forest.labels == label].mean(0) for label in alive])
    counts = torch.tensor([int((forest.labels == label).sum()) for label in alive]).double()
    assert torch.equal(forest.counts[alive], counts)
    costs = torch.cdist(m, m, compute_mode="donot_use_mm_for_euclid_dist").square()
    costs = costs * counts * counts.unsqueeze(1) / (counts + counts.unsqueeze(1))
    costs.fill_diagonal_(torch.inf)
    held = forest.costs[alive][:, alive]
    torch.testing.assert_close(held, costs, rtol=1e-6, atol=1e-9)
    assert torch.equal(held, held.T)  # else of two clusters each other's cheapest would be a third
    if len(alive) > 1:
        waiting, lowest = forest.nearest[alive] == alive, costs.amin(1)
        assert bool((forest.cost[alive][waiting] <= lowest[waiting] * (1 + 1e-6)).all())
        torch.testing.assert_close(forest.cost[alive][~waiting], lowest[~waiting], rtol=1e-6, atol=1e-9)
        assert torch.equal(forest.nearest[alive][~waiting], alive[costs.argmin(1)][~waiting])


@pytest.mark.parametrize("tile", [2, 1000])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("limit", [1, 3, 1000])
@pytest.mark.parametrize("looks", [1, 4, 1000])
def test_a_forest_is_what_its_merges_make_it(tile, shared, limit, looks, monkeypatch):
    forget_tiles(monkeypatch, tile)
    monkeypatch.setattr(module, "LOOKS", looks)
    for seed in range(6):
        rows = rows_of(26, 6, seed=seed)
        labels = torch.arange(26)
        if shared:
            rows = rows[torch.arange(26) // 3 * 2]
            labels = _merge_duplicates(product(rows))
        gram = (product(rows) + product(rows).T) / 2
        given = gram.clone()
        forest, left = _Forest(gram, labels), int(labels.max()) + 1
        check_forest(forest, rows)
        while left > 1:
            before, cost = forest.labels.clone(), forest.cost.min()
            merged = forest.merge(min(limit, left - 1))
            assert 1 <= merged <= limit
            left -= merged
            assert len(forest.labels.unique()) == left
            check_forest(forest, rows)
            if merged == 1 and looks == 1000:  # the cheapest pair first
                pair = next(
                    label for label in forest.labels.unique() if len(before[forest.labels == label].unique()) > 1
                )
                assert ward_cost(rows, before, forest.labels == pair) == pytest.approx(float(cost))
        assert torch.equal(gram, given)


def test_costs_that_follow_from_costs_stay_right():
    """In float32, over hundreds of merges and with rows of all sizes."""
    rows = rows_of(400, 50) * torch.logspace(-2, 2, 400).double().unsqueeze(1)
    forest, left = _Forest(product(rows).float(), torch.arange(400)), 400
    while left > 12:
        left -= forest.merge(left - 12)
    m = torch.stack([rows[forest.labels == label].mean(0) for label in forest.labels.unique()])
    counts = torch.bincount(forest.labels.unique(return_inverse=True)[1]).double()
    expected = torch.cdist(m, m).square() * counts * counts.unsqueeze(1) / (counts + counts.unsqueeze(1))
    held = forest.costs[forest.penalty == 0][:, forest.penalty == 0].double()
    torch.testing.assert_close(held, expected.fill_diagonal_(torch.inf), rtol=1e-4, atol=0)


def test_where_many_are_nearest_to_the_same_few_only_some_look_again(monkeypatch):
    """Of rows at right angles the shortest is nearest to all."""
    rows = torch.linspace(1, 2, 200).double().diag()
    looked, look = [], _Forest._look
    monkeypatch.setattr(_Forest, "_look", lambda self, clusters: looked.append(len(clusters)) or look(self, clusters))
    labels, looks = {}, {}
    for most in (4, 1000):
        monkeypatch.setattr(module, "LOOKS", most)
        looked.clear()
        labels[most] = ward(product(rows), 60)
        looks[most] = sum(looked)
    assert looks[4] < 0.2 * looks[1000]
    assert partition(labels[4]) == partition(labels[1000])


def ward_cost(rows: Tensor, before: Tensor, members: Tensor) -> float:
    a, b = (rows[members & (before == label)] for label in before[members].unique())
    return float(len(a) * len(b) / (len(a) + len(b)) * (a.mean(0) - b.mean(0)).square().sum())


def test_each_round_merges_all_pairs_that_are_each_others_nearest():
    rows = torch.tensor([[0.0], [1.0], [10.0], [11.5], [30.0]]).double()
    forest = _Forest(product(rows), torch.arange(5))
    assert forest.merge(4) == 2
    assert partition(forest.labels) == {frozenset({0, 1}), frozenset({2, 3}), frozenset({4})}


def test_ties_that_chase_each_other_round_are_broken():
    """As on a device that finds any of several nearest."""
    forest = _Forest(torch.eye(3), torch.arange(3))
    forest.nearest = torch.tensor([1, 2, 0])
    assert forest.merge(2) == 1 and len(forest.labels.unique()) == 2


@pytest.mark.parametrize("c", [1, 4, 6, 7, 12])
def test_ward_labels_are_contiguous_for_any_number_of_clusters(c):
    rows = rows_of(6, 4)[torch.arange(12) // 2]
    labels = ward(product(rows), c)
    assert sorted(labels.unique().tolist()) == list(range(c))
    if c >= 6:
        assert all(len(rows[sorted(cluster)].unique(dim=0)) == 1 for cluster in partition(labels))
