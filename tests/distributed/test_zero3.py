"""DeepSpeed ZeRO-3 by two CPU processes: fused and loaded in parts, trained, gathered, saved."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from architectures import BY_NAME
from helpers import half, logits
from peft import PeftModel, get_peft_model
from two import run_by_two

LLAMA = BY_NAME["llama"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero3")
    model = LLAMA.make()
    model.save_pretrained(folder / "base")
    get_peft_model(model, half(LLAMA)).save_pretrained(folder / "adapter")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    run_by_two("zero3.py", str(folder))
    return folder


def test_narrow_weights_are_those_of_whole_ones_on_every_rank(trained: Path):
    model = get_peft_model(LLAMA.make(), half(LLAMA))
    expected = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for rank in range(2):
        found = torch.load(trained / f"fused{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], parameter) for name, parameter in expected.items())


def test_it_trains_as_one_process_does_and_loads_on_one_machine(trained: Path):
    alone = get_peft_model(LLAMA.make(), half(LLAMA))
    optimizer = torch.optim.AdamW([p for p in alone.parameters() if p.requires_grad], lr=1e-2)
    for step in range(2):
        alone(**LLAMA.batch(labels=True, seed=step, size=4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    loaded = PeftModel.from_pretrained(LLAMA.make(), trained / "trained")
    torch.testing.assert_close(logits(loaded, LLAMA), logits(alone, LLAMA), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(
        logits(loaded, LLAMA), logits(get_peft_model(LLAMA.make(), half(LLAMA)), LLAMA), atol=1e-2
    )
