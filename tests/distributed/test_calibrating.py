"""Two processes with half of the data each end with what one process with all of it ends with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import CASES, MODELS, batches, narrow_state
from helpers import logits, relative
from peft import get_peft_model, set_peft_model_state_dict
from torch import Tensor
from two import run_by_two

from peft_fusion import FusionConfig, calibrate

Found = list[dict[str, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder: Path = tmp_path_factory.mktemp("calibrating")
    run_by_two("calibrating.py", str(folder))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def alone(name: str, seed: int = 0) -> torch.nn.Module:
    case = CASES[name]
    architecture = MODELS[case.architecture]
    model, config = architecture.make(), FusionConfig(ratio=0.5, seed=seed, **case.settings)
    data = batches(architecture)
    mixed = data[0::2] + data[1::2]  # in any order
    calibrate(model, config, mixed if case.data else None, sequences=32, length=None if case.data else 8)
    return get_peft_model(model, config)


@pytest.mark.parametrize("name", [*CASES, "ffn", "hidden_states"])
def test_both_ranks_have_the_same_bits(name: str, by_two: Found):
    first, second = (rank[name] for rank in by_two)
    assert first and first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("no draws", "centroids"))])
def test_they_are_those_of_one_process(name: str, by_two: Found):
    for key, tensor in narrow_state(alone(name)).items():
        torch.testing.assert_close(by_two[0][name][key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["defaults, llama", "defaults, bert", "own text, llama"])
def test_with_draws_they_are_within_the_spread_of_seeds(name: str, by_two: Found):
    architecture = MODELS[CASES[name].architecture]
    original = logits(architecture.make(), architecture)
    errors = [relative(logits(alone(name, seed), architecture), original) for seed in range(4)]
    model = alone(name)
    state = {key.replace(".default.", "."): tensor for key, tensor in by_two[0][name].items()}
    set_peft_model_state_dict(model, state)
    found = relative(logits(model, architecture), original)
    assert 0.5 * min(errors) < found < 1.5 * max(errors)


def test_what_fails_on_one_rank_fails_on_both(by_two: Found):
    assert all(bool(rank["refused on both"]["refused"]) for rank in by_two)
