"""Kernel k-means against the same algorithms on the rows themselves, and on input made to break it."""

from __future__ import annotations

import itertools

import pytest
import torch
from by_hand import few, inertia, partition, problems, product, random_labels, rows_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_fusion.fusing.cluster import kmeans
from peft_fusion.fusing.cluster.gram import gram_matrix
from peft_fusion.fusing.cluster.kmeans import Clustering, cluster_means, kernel_kmeans, lloyd
from peft_fusion.fusing.cluster.local_search import Partition, refine
from peft_fusion.fusing.cluster.seeding import kmeans_plus_plus
from peft_fusion.fusing.cluster.ward import ward


def check(clustering: Clustering, n: int, c: int) -> None:
    """What holds for every clustering of n rows into c clusters."""
    assert clustering.labels.shape == (n,) and clustering.labels.dtype == torch.int64
    assert torch.equal(clustering.counts, torch.bincount(clustering.labels, minlength=c))
    assert clustering.counts.shape == (c,) and int(clustering.counts.min()) >= 1
    first = [clustering.labels.tolist().index(label) for label in range(c)]
    assert first == sorted(first)
    assert 0 <= clustering.inertia < float("inf")


# ------------------------------------------------------------------------------------------------ on real-valued rows


@few
@given(problems())
def test_inertia_is_that_of_the_rows(problem: tuple[Tensor, int]) -> None:
    rows, c = problem
    clustering = kernel_kmeans(product(rows), c)
    check(clustering, len(rows), c)
    assert clustering.inertia == pytest.approx(
        inertia(rows, clustering.labels), rel=1e-9, abs=1e-12 * float(rows.square().sum())
    )


@few
@given(problems(), st.integers(0, 1000), st.integers(0, 6))
def test_lloyd_gives_the_labels_of_lloyd_on_the_rows(problem: tuple[Tensor, int], seed: int, iterations: int) -> None:
    rows, c = problem
    start = random_labels(len(rows), c, seed)
    labels = start
    for _ in range(iterations):
        means = torch.stack([rows[labels == label].mean(0) for label in range(c)])
        moved = torch.cdist(rows, means, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        if len(moved.unique()) < c:  # Lloyd on the rows has no answer
            return
        labels = moved
    assert torch.equal(lloyd(product(rows), start, c, iterations), labels)


def test_lloyd_takes_as_many_iterations_as_allowed() -> None:
    gram, start = product(rows_of(300, 3)), random_labels(300, 10, seed=0)
    one_by_one = [start]
    while len(one_by_one) < 3 or not torch.equal(one_by_one[-1], one_by_one[-2]):
        one_by_one.append(lloyd(gram, one_by_one[-1], 10, 1))
    assert len(one_by_one) > 8
    for iterations, labels in enumerate(one_by_one):
        assert torch.equal(lloyd(gram, start, 10, iterations), labels)
    assert torch.equal(lloyd(gram, start, 10, 1000), one_by_one[-1])


def test_lloyd_never_empties_a_cluster() -> None:
    rows = torch.tensor([[0.0], [1.0], [10.0], [11.0], [0.5]]).double()
    start = torch.tensor([0, 1, 0, 1, 2])  # means 5, 6 and .5: the first would keep no row
    labels = lloyd(product(rows), start, 3, 1)
    assert sorted(labels.unique().tolist()) == [0, 1, 2]


@few
@given(problems(largest=25))
def test_no_single_move_lowers_the_inertia(problem: tuple[Tensor, int]) -> None:
    rows, c = problem
    found = kernel_kmeans(product(rows), c)
    for row, label in itertools.product(range(len(rows)), range(c)):
        if found.counts[found.labels[row]] > 1:
            other = found.labels.clone()
            other[row] = label
            assert inertia(rows, other) >= found.inertia * (1 - 1e-9) - 1e-12


@few
@given(problems(), st.integers(0, 1000))
def test_a_step_changes_the_inertia_by_what_it_promised(problem: tuple[Tensor, int], seed: int) -> None:
    """The exchanges are disjoint, so that their gains add exactly, as do single-row moves one a cluster."""
    rows, c = problem
    labels = kmeans_plus_plus(product(rows), c, torch.Generator().manual_seed(seed))
    state = Partition(product(rows), labels, c)
    moved, targets = state.exchanges()
    before = inertia(rows, labels)
    state.move(moved, targets)
    after = inertia(rows, state.labels)
    assert len(state.labels.unique()) == c
    assert after < before if len(moved) else after == before
    fresh = Partition(product(rows), state.labels, c)
    torch.testing.assert_close(state.sums, fresh.sums)
    assert state.explained() == pytest.approx(float(rows.square().sum()) - after, rel=1e-9)


@few
@given(problems(), st.integers(0, 1000))
def test_refinement_only_improves(problem: tuple[Tensor, int], seed: int) -> None:
    rows, c = problem
    start = torch.randint(c, (len(rows),), generator=torch.Generator().manual_seed(seed))
    start[:c] = torch.arange(c)
    labels = refine(product(rows), start, c, 100)
    assert len(labels.unique()) == c
    assert inertia(rows, labels) <= inertia(rows, start) * (1 + 1e-9)


@few
@given(problems(largest=20))
def test_ward_finds_clusters_of_the_exact_dendrogram(problem: tuple[Tensor, int]) -> None:
    rows, c = problem
    clusters = [frozenset([row]) for row in range(len(rows))]
    tree = set(clusters)
    while len(clusters) > 1:
        pairs = itertools.combinations(clusters, 2)
        a, b = min(pairs, key=lambda pair: merge_cost(rows, *pair))
        clusters = [cluster for cluster in clusters if cluster not in (a, b)] + [a | b]
        tree.add(a | b)
    labels = ward(product(rows), c)
    assert len(labels.unique()) == c
    assert partition(labels) <= tree


def merge_cost(rows: Tensor, a: frozenset[int], b: frozenset[int]) -> float:
    gap = rows[sorted(a)].mean(0) - rows[sorted(b)].mean(0)
    return float(gap.square().sum()) * len(a) * len(b) / (len(a) + len(b))


@few
@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(problem: tuple[Tensor, int], random) -> None:  # noqa: ANN001
    rows, c = problem
    order = torch.tensor(random.sample(range(len(rows)), len(rows)))
    shuffled = torch.empty(len(rows), dtype=torch.int64)
    shuffled[order] = kernel_kmeans(product(rows[order]), c).labels
    assert partition(shuffled) == partition(kernel_kmeans(product(rows), c).labels)


def test_finds_the_best_partition_of_separated_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(12, (300,), generator=generator)
    rows = 50 * torch.randn(12, 40, generator=generator)[truth] + torch.randn(300, 40, generator=generator)
    for n_init in (1, 3):
        assert partition(kernel_kmeans(gram_matrix([rows]), 12, n_init=n_init).labels) == partition(truth)


def test_is_better_than_the_best_of_many_lloyd_runs() -> None:
    rows = rows_of(400, 50)
    gram = product(rows)
    generator = torch.Generator().manual_seed(1)
    starts = (kmeans_plus_plus(gram, 100, generator) for _ in range(10))
    best = min(inertia(rows, lloyd(gram, start, 100, 100)) for start in starts)
    assert kernel_kmeans(gram, 100).inertia < 0.99 * best


def test_more_starts_never_do_worse() -> None:
    gram = product(rows_of(150, 20))
    inertias = [kernel_kmeans(gram, 40, n_init=n_init, seed=3).inertia for n_init in (1, 2, 6)]
    assert inertias == sorted(inertias, reverse=True)


def test_more_sweeps_never_do_worse() -> None:
    gram = product(rows_of(400, 50))
    inertias = [kernel_kmeans(gram, 100, max_iter=max_iter).inertia for max_iter in (0, 3, 100)]
    assert inertias == sorted(inertias, reverse=True) and inertias[0] > inertias[-1]


@pytest.mark.parametrize("max_iter", [0, 1, 2, 7])
@pytest.mark.parametrize("seed", range(4))
def test_every_start_is_another_and_the_best_is_kept(monkeypatch, max_iter: int, seed: int) -> None:
    """The first is Ward's; all are allowed as many iterations and sweeps."""
    rows, c, starts, ends = rows_of(70, 6, seed=seed), 15, [], []

    def drawn(gram: Tensor, labels: Tensor, n_clusters: int, most: int) -> Tensor:
        assert most == max_iter
        starts.append(labels)
        return lloyd(gram, labels, n_clusters, most)

    def refined(gram: Tensor, labels: Tensor, n_clusters: int, most: int) -> Tensor:
        assert most == max_iter
        expected = lloyd(gram, starts[-1], c, most) if starts else ward(gram, c)
        assert torch.equal(labels, expected)
        ends.append(refine(gram, labels, n_clusters, most))
        return ends[-1]

    monkeypatch.setattr(kmeans, "lloyd", drawn)
    monkeypatch.setattr(kmeans, "refine", refined)
    found = kernel_kmeans(product(rows), c, n_init=5, max_iter=max_iter, seed=seed)
    expected = torch.Generator().manual_seed(seed)
    assert len(ends) == 5 and len({tuple(labels.tolist()) for labels in starts}) == 4
    assert all(torch.equal(labels, kmeans_plus_plus(product(rows), c, expected)) for labels in starts)
    inertias = [inertia(rows, labels) for labels in ends]
    assert found.inertia == pytest.approx(min(inertias), rel=1e-9)
    assert partition(found.labels) == partition(ends[inertias.index(min(inertias))])


def test_inertia_is_summed_in_double_precision() -> None:
    """Of large rows in tight clusters little is left of what float32 sums."""
    rows = (1000 * rows_of(4, 30).repeat(50, 1) + rows_of(200, 30, seed=1)).float()
    gram = gram_matrix([rows])
    found = kernel_kmeans(gram, 4)
    blocks = [gram.double()[found.labels == label][:, found.labels == label] for label in range(4)]
    expected = sum(float(block.diagonal().sum() - block.sum() / len(block)) for block in blocks)
    assert found.inertia == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gram_matrix_in_half_precision_is_clustered_in_float32(dtype: torch.dtype) -> None:
    gram = product(rows_of(40, 6) / 10).to(dtype)
    found, expected = kernel_kmeans(gram, 9), kernel_kmeans(gram.float(), 9)
    assert torch.equal(found.labels, expected.labels) and found.inertia == expected.inertia


# --------------------------------------------------------------------------------------------- duplicates and extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@few
@given(data=st.data())
def test_equal_rows_fuse_exactly(data: st.DataObject, dtype: torch.dtype) -> None:
    """With clusters enough, a cluster holds equal rows only; with just enough, all of them."""
    distinct = data.draw(st.integers(1, 12))
    copies = data.draw(st.lists(st.integers(1, 5), min_size=distinct, max_size=distinct))
    identity = torch.arange(distinct).repeat_interleave(torch.tensor(copies))
    identity = identity[torch.randperm(len(identity), generator=torch.Generator().manual_seed(sum(copies)))]
    c = data.draw(st.integers(distinct, len(identity)))
    rows = rows_of(distinct, 30, seed=data.draw(st.integers(0, 1000)))[identity].to(dtype)
    n_init = data.draw(st.integers(1, 2))
    clustering = kernel_kmeans(gram_matrix([rows]), c, n_init=n_init)
    check(clustering, len(rows), c)
    for cluster in partition(clustering.labels):
        assert len(identity[sorted(cluster)].unique()) == 1
    if c == distinct:
        assert partition(clustering.labels) == partition(identity)
    scale = float(rows.double().square().sum())
    assert clustering.inertia <= 20 * torch.finfo(dtype).eps * scale


ADVERSARIAL = {
    "all equal": torch.ones(40, 7),
    "all zero": torch.zeros(40, 7),
    "three distinct": rows_of(3, 7).float()[torch.arange(40) % 3],
    "huge outlier": torch.cat([rows_of(39, 7).float(), torch.full((1, 7), 1e15)]),
    "tiny": rows_of(40, 7).float() * 1e-20,
    "huge": rows_of(40, 7).float() * 1e20,
    "one dimension, ties": (torch.arange(40.0) // 4).unsqueeze(1),
    "opposite": torch.cat([rows_of(20, 7), -rows_of(20, 7)]).float(),
    "orthogonal": torch.eye(40),
}


@pytest.mark.parametrize("c", [1, 2, 5, 13, 33, 39, 40])
@pytest.mark.parametrize("case", ADVERSARIAL)
@pytest.mark.parametrize("n_init", [1, 3])
def test_no_cluster_is_ever_empty(case: str, c: int, n_init: int) -> None:
    clustering = kernel_kmeans(gram_matrix([ADVERSARIAL[case]]), c, n_init=n_init)
    check(clustering, 40, c)
    if c == 40:
        assert torch.equal(clustering.labels, torch.arange(40)) and clustering.inertia == 0


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_the_scale_of_the_rows_does_not_matter(size: float) -> None:
    rows = rows_of(120, 16).float()
    plain, scaled = (kernel_kmeans(gram_matrix([r]), 30) for r in (rows, rows * size))
    assert torch.equal(plain.labels, scaled.labels)
    assert scaled.inertia == pytest.approx(plain.inertia * size**2, rel=1e-4)


def test_a_huge_outlier_stands_alone() -> None:
    clustering = kernel_kmeans(gram_matrix([ADVERSARIAL["huge outlier"]]), 8)
    assert int((clustering.labels == clustering.labels[-1]).sum()) == 1


def test_one_cluster_has_the_total_inertia() -> None:
    rows = rows_of(50, 6)
    assert kernel_kmeans(product(rows), 1).inertia == pytest.approx(float((rows - rows.mean(0)).square().sum()))


# ------------------------------------------------------------------------------------------------- the same every time


@pytest.mark.parametrize("case", ["rows", "ties"])
def test_same_labels_for_any_number_of_threads(case: str) -> None:
    rows = rows_of(700, 90) if case == "rows" else rows_of(700, 3).mul(2).round()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(kernel_kmeans(gram_matrix([rows.float()]), 175, n_init=2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(clustering.labels, found[0].labels) for clustering in found)
    assert len({clustering.inertia for clustering in found}) == 1


def test_depends_on_the_seed_alone() -> None:
    gram = product(rows_of(100, 10))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = kernel_kmeans(gram, 25, n_init=4, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(kernel_kmeans(gram, 25, n_init=4, seed=5).labels, first.labels)
    starts = [kmeans_plus_plus(gram, 25, torch.Generator().manual_seed(seed)) for seed in (5, 6)]
    assert not torch.equal(*starts)


def test_leaves_the_gram_matrix_alone() -> None:
    gram = product(rows_of(100, 10))
    before = gram.clone()
    kernel_kmeans(gram, 25, n_init=2)
    assert torch.equal(gram, before)


# ----------------------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_cluster_means_are_the_means_of_any_rows(dtype: torch.dtype) -> None:
    rows = rows_of(60, 5)
    clustering = kernel_kmeans(product(rows), 9)
    other = rows_of(60, 11, seed=1).to(dtype)
    expected = torch.stack([other.double()[clustering.labels == label].mean(0) for label in range(9)])
    means = cluster_means(other, clustering)
    assert means.dtype == dtype
    torch.testing.assert_close(means, expected.to(dtype))


NAN = torch.eye(3).fill_diagonal_(float("nan"))


@pytest.mark.parametrize(
    ("gram", "arguments", "message"),
    [
        (torch.eye(3), {"n_clusters": 0}, "`n_clusters` must be 1 to 3.*got 0"),
        (torch.eye(3), {"n_clusters": 4}, "`n_clusters` must be 1 to 3.*got 4"),
        (torch.ones(3, 4), {"n_clusters": 1}, r"shape \(n, n\); got \(3, 4\)"),
        (torch.ones(2, 3, 3), {"n_clusters": 1}, r"shape \(n, n\)"),
        (torch.eye(3), {"n_clusters": 1, "n_init": 0}, "`n_init` must be at least 1"),
        (torch.eye(3), {"n_clusters": 1, "max_iter": -1}, "`max_iter` at least 0"),
        (NAN, {"n_clusters": 1}, "NaN"),
        (torch.eye(3).fill_diagonal_(float("inf")), {"n_clusters": 1}, "NaN or infinite"),
    ],
)
def test_refuses(gram: Tensor, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel_kmeans(gram, **arguments)
