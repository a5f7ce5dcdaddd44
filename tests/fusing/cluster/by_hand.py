"""Rows to cluster, and what clusterings of them come to by plain loops over the rows."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

few = settings(max_examples=40, deadline=None, derandomize=True)


def rows_of(n: int, d: int, seed: int = 0) -> Tensor:
    """Rows of very different norms around a few directions, like those of an FFN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    centres = normal(max(2, n // 5), d)
    picked = centres[torch.randint(len(centres), (n,), generator=generator)]
    return (picked + 0.7 * normal(n, d)) * normal(n, 1).exp()


def product(rows: Tensor) -> Tensor:
    return rows @ rows.T


def inertia(rows: Tensor, labels: Tensor) -> float:
    clusters = (rows[labels == label] for label in labels.unique())
    return float(sum((members - members.mean(0)).square().sum() for members in clusters))


def partition(labels: Tensor) -> set[frozenset[int]]:
    return {frozenset((labels == label).nonzero().flatten().tolist()) for label in labels.unique()}


def means(rows: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([rows[labels == label].mean(0) for label in range(int(labels.max()) + 1)])


def random_labels(n: int, c: int, seed: int) -> Tensor:
    """Labels of which none is missing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(c, (n,), generator=generator)
    labels[torch.randperm(n, generator=generator)[:c]] = torch.arange(c)
    return labels


@st.composite
def problems(draw: st.DrawFn, largest: int = 60) -> tuple[Tensor, int]:
    n = draw(st.integers(1, largest))
    rows = rows_of(n, draw(st.integers(1, 12)), seed=draw(st.integers(0, 2**31)))
    return rows, draw(st.integers(1, n))
