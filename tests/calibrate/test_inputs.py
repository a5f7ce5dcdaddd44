"""What a model is calibrated on: how much, of what, and which of it is held out."""

from __future__ import annotations

import pytest
import torch
from architectures import BY_NAME

from peft_fusion.calibrate.inputs import FEWEST_SEQUENCES, MOST_SEQUENCES, OWN_SEQUENCES, SEQUENCES, Inputs
from peft_fusion.ffn import find_ffns
from peft_fusion.observe.fisher import METRIC_SEQUENCES
from peft_fusion.observe.networks import Network
from peft_fusion.observe.own_inputs import OWN_LENGTH

LLAMA = BY_NAME["llama"]


def network() -> Network:
    model = LLAMA.make()
    model.config.max_position_embeddings = 1000  # the length is the default, not the longest
    return Network(model, find_ffns(model), fused=False)


def loader(count: int, size: int = 4):
    for i in range(count):
        yield {"input_ids": torch.arange(i * size, (i + 1) * size).view(size, 1)}


def test_how_much_it_takes_unless_told():
    own = Inputs.of(network(), None, None, OWN_LENGTH, seed=0)
    assert own.count == OWN_SEQUENCES and own.batches[0]["input_ids"].shape[1] == OWN_LENGTH
    assert Inputs.of(network(), loader(80), None, OWN_LENGTH, seed=0).count == SEQUENCES
    assert Inputs.of(network(), loader(80), 10, OWN_LENGTH, seed=0).count == 10
    assert Inputs.of(network(), loader(2), None, OWN_LENGTH, seed=0).count == 8


@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_scales_are_fitted_to_sequences_that_the_refit_does_not_see(size):
    inputs = Inputs.of(network(), loader(1000, size), 200, OWN_LENGTH, seed=0)
    found = [int(s["input_ids"]) for s in inputs.for_the_scales]
    assert found == list(range(3, 200, 4))[: 200 // 20]


@pytest.mark.parametrize(
    ("sequences", "expected"), [(40, FEWEST_SEQUENCES), (120, 6), (200, 10), (600, MOST_SEQUENCES)]
)
def test_the_sequences_with_gradients_are_bounded(sequences, expected):
    inputs = Inputs.of(network(), loader(1000), sequences, OWN_LENGTH, seed=0)
    assert len(inputs.for_the_scales) == expected
    assert len(inputs.for_the_metric) == min(sequences, METRIC_SEQUENCES)
    assert [int(s["input_ids"]) for s in inputs.for_the_metric[:5]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("count", "size"), [(0, 4), (1, 2), (3, 1)])
def test_too_few(count, size):
    with pytest.raises(ValueError, match=f"at least 4 sequences, .* but got {count * size}"):
        Inputs.of(network(), loader(count, size), None, OWN_LENGTH, seed=0)
    with pytest.raises(ValueError, match="but got 2") as refusal:
        Inputs.of(network(), None, 2, OWN_LENGTH, seed=0)
    assert "data loader" not in str(refusal.value)


def test_one_pass_over_the_data_loader():
    """Several groups of FFNs see the same sequences, and a generator will do."""
    calls = []

    def once():
        calls.append(1)
        yield from loader(5)

    inputs = Inputs.of(network(), once(), None, OWN_LENGTH, seed=0)
    assert len(calls) == 1 and len(inputs.batches) == 5
