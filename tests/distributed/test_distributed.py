"""Two CPU processes train one fused model: their weights agree, and what they save loads in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import Architecture
from helpers import half, logits
from peft import PeftModel, get_peft_model
from two import run_by_two
from worker import MODELS

CASES = [
    "llama-ddp-keep",
    "llama-ddp-offload",
    "llama-ddp-discard",
    "llama-fsdp-keep",
    "llama-fsdp-discard",
    "llama-fsdp_orig_params-keep",
    "llama-fsdp_orig_params-discard",
    "llama-fsdp2-keep",
    "llama-fsdp2-discard",
    "mixtral-ddp-keep",
    "mixtral-fsdp_orig_params-keep",
    "mixtral-fsdp2-keep",
    "mixtral-fsdp2-discard",
]
STEPS = 2


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder to which worker.py, run in two processes for all cases (starting it costs most), wrote."""
    folder = tmp_path_factory.mktemp("distributed")
    run_by_two("worker.py", str(folder), *CASES)
    return folder


def trained_alone(architecture: Architecture) -> torch.nn.Module:
    """The same steps on whole batches in this process."""
    model = get_peft_model(architecture.make(), half(architecture))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        model(**architecture.batch(labels=True, seed=step, size=4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_and_one_process_loads_what_they_saved(case: str, trained_by_two: Path):
    folder = trained_by_two / case
    first, second = (torch.load(folder / f"rank{rank}.pt") for rank in range(2))
    assert first["start"] and first["start"].keys() == second["start"].keys()
    for name, tensor in first["start"].items():
        assert torch.equal(tensor, second["start"][name]), f"{name} was fused differently"
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), f"{name} differs after training"
        if name in first["start"]:
            assert not torch.equal(tensor, first["start"][name]), f"{name} did not train"
    architecture = MODELS[case.split("-")[0]]
    loaded = PeftModel.from_pretrained(architecture.make(), folder / "adapter", is_trainable=True)
    for name, parameter in loaded.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, first["state"][name])
    expected = logits(trained_alone(architecture), architecture)
    torch.testing.assert_close(logits(loaded, architecture), expected, rtol=1e-3, atol=1e-3)
