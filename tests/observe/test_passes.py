"""Which sequences go through a model together."""

from __future__ import annotations

import torch

from peft_fusion.observe.passes import passes_of


def test_neighbours_of_one_shape_are_joined_and_nothing_else():
    def sequence(length: int, start: int, **more) -> dict:
        return {"input_ids": torch.arange(start, start + length).unsqueeze(0), **more}

    sequences = [sequence(3, 0), sequence(3, 10), sequence(3, 20), sequence(4, 30), sequence(3, 40)]
    found = passes_of(sequences, 2)
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(2, 3), (1, 3), (1, 4), (1, 3)]
    assert torch.cat([batch["input_ids"].flatten() for batch in found]).tolist() == [
        *range(3), *range(10, 13), *range(20, 23), *range(30, 34), *range(40, 43)
    ]  # fmt: skip
    assert len(passes_of(sequences, 1)) == 5
    for odd in ({"mode": "text"}, {"grid": torch.ones(3, 2)}, {"scale": torch.tensor(1.0)}):
        alone = [sequence(3, 0, **odd), sequence(3, 10, **odd)]
        assert passes_of(alone, 2) == alone
