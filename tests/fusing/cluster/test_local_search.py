"""Moves of single rows and exchanges of clusters, against what they come to on the rows themselves."""

from __future__ import annotations

import itertools

import pytest
import torch
from by_hand import few, inertia, means, problems, product, random_labels, rows_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_fusion.fusing.cluster import local_search
from peft_fusion.fusing.cluster.local_search import CROWD, Partition, _descend, _within_limits, refine

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def check_state(state: Partition, rows: Tensor) -> None:
    """All that a partition holds is what the rows and their labels say."""
    m, counts = means(rows, state.labels), torch.bincount(state.labels)
    assert torch.equal(state.counts, counts)
    torch.testing.assert_close(state.mean_squares, m.square().sum(1), **EXACT)
    sums = torch.stack([rows[state.labels == label].sum(0) for label in range(len(counts))])
    torch.testing.assert_close(state.sums, sums @ rows.T, **EXACT)
    joining = torch.cdist(m, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    joining *= (counts.double() / (counts + 1)).unsqueeze(1)
    joining[state.labels, torch.arange(len(rows))] = torch.inf
    torch.testing.assert_close(state.costs, joining, **EXACT)
    assert state.explained() == pytest.approx(float(rows.square().sum()) - inertia(rows, state.labels), rel=1e-9)


def moved(rows: Tensor, labels: Tensor, row: int, target: int) -> float:
    """The change of the inertia if a row went elsewhere."""
    other = labels.clone()
    other[row] = target
    return inertia(rows, other) - inertia(rows, labels)


@few
@given(problems(largest=30), st.integers(0, 1000))
def test_a_partition_is_what_its_moves_make_it(problem, seed):
    rows, c = problem
    labels = random_labels(len(rows), c, seed)
    state = Partition(product(rows), labels, c)
    check_state(state, rows)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        wanted = state.labels.clone()
        for row in torch.randperm(len(rows), generator=generator)[:4].tolist():
            if int((wanted == wanted[row]).sum()) > 1:
                wanted[row] = torch.randint(c, (1,), generator=generator)
        chosen = (wanted != state.labels).nonzero().squeeze(1)
        state.move(chosen, wanted[chosen])
        assert torch.equal(state.labels, wanted)
        check_state(state, rows)
    assert torch.equal(labels, random_labels(len(rows), c, seed))  # those given are left alone


@few
@given(problems(largest=16), st.integers(0, 1000))
def test_improving_moves_are_all_there_are_the_largest_gain_first(problem, seed):
    rows, c = problem
    labels = random_labels(len(rows), c, seed)
    found, targets = Partition(product(rows), labels, c).improving_moves()
    best: dict[int, tuple[float, int]] = {}
    for row in range(len(rows)):
        others = [label for label in range(c) if label != labels[row]]
        if others and int((labels == labels[row]).sum()) > 1:
            change, target = min((moved(rows, labels, row, label), label) for label in others)
            if change < -1e-9 * float(rows.square().sum()):
                best[row] = change, target
    assert found.tolist() == sorted(best, key=best.get)
    assert targets.tolist() == [best[row][1] for row in found.tolist()]


@few
@given(problems(largest=24), st.integers(0, 1000))
def test_exchanges_gain_what_merging_costs_and_leaving_saves(problem, seed):
    rows, c = problem
    labels = random_labels(len(rows), c, seed)
    state = Partition(product(rows), labels, c)
    found, targets = state.exchanges()
    after = labels.clone()
    after[found] = targets
    touched = torch.cat([labels[found], targets]).unique()
    alone = [row for row in found.tolist() if int((after == after[row]).sum()) == 1]
    merged = {int(labels[row]) for row in found.tolist()} - {int(labels[row]) for row in alone}
    assert len(after.unique()) == c and len(alone) == len(merged) and len(touched) == 3 * len(alone)
    change = 0.0
    for row in alone:
        change += moved(rows, torch.where(torch.arange(len(rows)) == row, c, labels), row, int(labels[row])) * -1
        freed = int(after[row])
        into = int(after[labels == freed].unique()[0])
        change += inertia(rows, torch.where(labels == freed, into, labels)) - inertia(rows, labels)
    assert inertia(rows, after) - inertia(rows, labels) == pytest.approx(change, rel=1e-6, abs=1e-9)
    assert change < 0 or not alone
    for row in alone:  # and each of them pays by itself
        freed = int(after[row])
        one = torch.where(labels == freed, int(after[labels == freed].unique()[0]), labels)
        one[row] = freed
        assert inertia(rows, one) < inertia(rows, labels)


def test_the_cheapest_merge_frees_a_cluster_for_the_row_that_gains_most():
    rows = torch.tensor([[0.0], [0.3], [9.0], [9.4], [20.0], [21.0], [26.0], [40.0], [43.0]]).double()
    labels = torch.tensor([0, 1, 2, 3, 4, 4, 4, 5, 5])
    found, targets = Partition(product(rows), labels, 6).exchanges()
    after = labels.clone()
    after[found] = targets
    assert after.tolist() == [0, 0, 2, 2, 4, 4, 1, 5, 3] or after.tolist() == [0, 0, 2, 2, 4, 4, 1, 3, 5]


def test_a_cluster_gives_up_one_row_at_a_time():
    rows = torch.tensor([[0.0], [0.1], [5.0], [5.1], [50.0], [70.0], [90.0]]).double()
    labels = torch.tensor([0, 1, 2, 3, 4, 4, 4])
    found, targets = Partition(product(rows), labels, 5).exchanges()
    assert len(found) == 2 and int((labels[found] == 4).sum()) == 1


def test_without_a_pair_that_is_cheap_enough_nothing_is_exchanged():
    rows = torch.tensor([[0.0], [1.0], [10.0], [11.0]]).double()
    assert len(Partition(product(rows), torch.tensor([0, 0, 1, 1]), 2).exchanges()[0]) == 0


# ------------------------------------------------------------------------------------------------------------- sweeps


@few
@given(problems(largest=40), st.integers(0, 1000))
def test_from_anywhere_it_ends_where_nothing_improves(problem, seed):
    """Whatever number of sweeps that takes: neither a move nor an exchange is left, by the rows themselves."""
    rows, c = problem
    labels = refine(product(rows), random_labels(len(rows), c, seed), c, 1000)
    state = Partition(product(rows), labels, c)
    assert len(state.improving_moves()[0]) == 0 and len(state.exchanges()[0]) == 0
    slack = 1e-9 * float(rows.square().sum())
    for row, label in itertools.product(range(len(rows)), range(c)):
        if int((labels == labels[row]).sum()) > 1:
            assert moved(rows, labels, row, label) >= -slack


class Moves:
    """Counts the calls of `Partition.move`, each a sweep or a round of exchanges."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        original = Partition.move

        def move(state: Partition, rows: Tensor, targets: Tensor) -> None:
            self.sizes.append(len(rows))
            original(state, rows, targets)

        monkeypatch.setattr(Partition, "move", move)


def test_as_many_sweeps_as_allowed_and_no_more(monkeypatch):
    rows, start, moves = rows_of(300, 20), random_labels(300, 60, seed=0), Moves(monkeypatch)
    reached, needed = [], 0
    for most in range(41):
        moves.sizes.clear()
        labels = refine(product(rows), start, 60, most)
        reached.append(inertia(rows, labels))
        assert len(moves.sizes) <= most
        needed = max(needed, len(moves.sizes))
        if len(moves.sizes) < most - 1:  # the end is reached; looking that nothing is left takes none
            break
        assert len(moves.sizes) >= most - 1
    assert needed > 10 and reached[0] == inertia(rows, start)
    assert reached == sorted(reached, reverse=True) and len(set(reached)) > 8


def test_sweeps_are_told(monkeypatch):
    rows, start, moves = rows_of(200, 20), random_labels(200, 40, seed=0), Moves(monkeypatch)
    swept = _descend(Partition(product(rows), start, 40), 100)
    assert swept == len(moves.sizes) > 4
    moves.sizes.clear()
    assert _descend(Partition(product(rows), start, 40), swept) == swept == len(moves.sizes)
    moves.sizes.clear()
    assert _descend(Partition(product(rows), start, 40), 2) == 2 == len(moves.sizes)


def test_after_exchanges_single_rows_move_on(monkeypatch):
    """And after these others are exchanged: three rounds at least, on rows that are made to need them."""
    rows, start, moves = rows_of(300, 10), random_labels(300, 100, seed=3), Moves(monkeypatch)
    calls: list[str] = []
    descend, exchanges = local_search._descend, Partition.exchanges
    monkeypatch.setattr(local_search, "_descend", lambda *given: calls.append("sweeps") or descend(*given))
    monkeypatch.setattr(Partition, "exchanges", lambda state: calls.append("exchanges") or exchanges(state))
    refine(product(rows), start, 100, 1000)
    assert calls[:6] == ["sweeps", "exchanges"] * 3 and calls[-1] == "exchanges" and moves.sizes


def test_a_crowd_moves_at_first_and_one_row_a_cluster_once_that_does_not_pay(monkeypatch):
    rows = torch.cat([rows_of(300, 8), rows_of(300, 8, seed=1) + 3])
    start, moves = random_labels(600, 3, seed=0), Moves(monkeypatch)
    state = Partition(product(rows), start, 3)
    limits = state.counts // CROWD
    state.improving_moves()
    _descend(state, 1)
    assert 3 < moves.sizes[0] <= int(limits.sum())
    # Two crowds that would change places for ever
    spread = torch.tensor([[-1.0], [1.0]]).double().repeat(40, 1)
    swapped = Partition(product(spread), random_labels(80, 2, seed=1), 2)
    _descend(swapped, 1000)
    assert len(swapped.improving_moves()[0]) == 0


@few
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=20), st.integers(0, 1000))
def test_within_limits_by_counting(moves, seed):
    """A move is made unless one of its clusters has been named by as many better ones as it may take part in."""
    limits = torch.randint(1, 4, (5,), generator=torch.Generator().manual_seed(seed))
    sources, targets = torch.tensor(moves, dtype=torch.int64).reshape(-1, 2).T
    named, expected = [0] * 5, []
    for a, b in moves:
        places = []
        for cluster in (a, b):
            places.append(named[cluster] < limits[cluster])
            named[cluster] += 1
        expected.append(bool(all(places)))
    assert _within_limits(sources, targets, limits).tolist() == expected


def test_large_clusters_are_improved_to_the_end():
    """Also once it no longer pays to move many rows of a cluster at a time."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(300, 2, generator=generator, dtype=torch.float64)
        labels = torch.arange(300) % 5
        gram = rows @ rows.T
        found = refine(gram, labels, 5, max_iter=1000)
        moves, _ = Partition(gram, found, 5).improving_moves()
        assert len(moves) == 0
