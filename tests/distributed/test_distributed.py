"""Two CPU processes train one fused model: their weights agree, and what they save loads in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import BY_NAME
from helpers import half, logits
from peft import PeftModel, get_peft_model
from two import run_by_two

LLAMA = BY_NAME["llama"]
CASES = [
    "ddp-keep",
    "ddp-offload",
    "ddp-discard",
    "fsdp-keep",
    "fsdp-discard",
    "fsdp_orig_params-keep",
    "fsdp_orig_params-discard",
    "fsdp2-keep",
    "fsdp2-discard",
]
STEPS = 2


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder to which worker.py, run in two processes for all cases (starting it costs most), wrote."""
    folder = tmp_path_factory.mktemp("distributed")
    run_by_two("worker.py", str(folder), *CASES)
    return folder


def trained_alone() -> torch.nn.Module:
    """The same steps on whole batches in this process."""
    model = get_peft_model(LLAMA.make(), half(LLAMA))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        model(**LLAMA.batch(labels=True, seed=step, size=4)).loss.backward()
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
    loaded = PeftModel.from_pretrained(LLAMA.make(), folder / "adapter", is_trainable=True)
    for name, parameter in loaded.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, first["state"][name])
    torch.testing.assert_close(logits(loaded, LLAMA), logits(trained_alone(), LLAMA), rtol=1e-3, atol=1e-3)
