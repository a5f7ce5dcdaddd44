"""Two processes that distil together end with the same weights, those of one process with whole batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distilling import distilled
from torch import Tensor
from two import run_by_two


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder: Path = tmp_path_factory.mktemp("distilling")
    run_by_two("distilling.py", str(folder))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("kind", ["data", "own text"])
def test_both_ranks_have_the_same_bits(kind: str, by_two: list[dict[str, dict[str, Tensor]]]):
    first, second = (rank[kind] for rank in by_two)
    assert first.keys() == second.keys() and len(first) > 1
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert first["distances"][1] < first["distances"][0]


def test_they_are_those_of_one_process(by_two: list[dict[str, dict[str, Tensor]]], tmp_path: Path):
    for name, tensor in distilled(str(tmp_path), 1).items():
        torch.testing.assert_close(by_two[0]["data"][name], tensor, rtol=2e-3, atol=2e-4)
