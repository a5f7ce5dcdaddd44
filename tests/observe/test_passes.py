"""Which sequences go through a model together."""

from __future__ import annotations

import pytest
import torch
from architectures import BY_NAME

from peft_fusion.ffn import find_ffns
from peft_fusion.observe import passes
from peft_fusion.observe.networks import Network
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


@pytest.mark.parametrize(
    ("share", "vocabulary", "expected"), [(1 / 16, 100, 2), (1 / 16, 3000, 1), (1.0, 100, 8), (1e-9, 100, 1)]
)
def test_more_sequences_go_together_where_that_is_little_beside_the_weights(share, vocabulary, expected, monkeypatch):
    model = BY_NAME["llama"].make(hidden_size=512, intermediate_size=1024, num_hidden_layers=11)
    model.config.vocab_size = vocabulary
    monkeypatch.setattr(passes, "ACTIVATIONS_SHARE", share)
    taken = 64 * (4 * (4 * 1024 + 8 * 512) + 8 * vocabulary)  # by a sequence's layer and its logits
    fits = int(share * sum(p.nbytes for p in model.parameters()) / taken)
    assert passes.sequences_at_once(Network(model, find_ffns(model), fused=False)) == expected == max(1, min(8, fits))
