"""One of two CPU processes that calibrate and tune a model together. Started by test_calibrating.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from architectures import BY_NAME
from cases import CASES, MODELS, batches, narrow_state, tuned
from peft import get_peft_model

from peft_fusion import FusionConfig, calibrate

LLAMA = BY_NAME["llama"]


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {}
    for name, case in CASES.items():
        torch.manual_seed(rank)  # what drew from the global generator would come to differ
        architecture = MODELS[case.architecture]
        model, config = architecture.make(), FusionConfig(ratio=0.5, **case.settings)
        own = batches(architecture)[rank::2] if case.data else None
        calibrate(model, config, own, sequences=32, length=None if case.data else 8)
        found[name] = narrow_state(get_peft_model(model, config))
    for objective in ("ffn", "hidden_states"):
        found[objective] = tuned(objective, batches(LLAMA)[rank::2])
    found["refused on both"] = {"refused": torch.tensor(refused(rank))}
    torch.save(found, Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


def refused(rank: int) -> bool:
    """Whether this rank stops, though only the second one has batches that the model cannot take."""
    data = batches(LLAMA) if rank == 0 else [{"pixels": torch.ones(4, 7)}] * 4
    try:
        calibrate(LLAMA.make(), FusionConfig(ratio=0.5), data)
    except (ValueError, RuntimeError) as error:
        return ("rank 1: ValueError" in str(error)) if rank == 0 else ("cannot take a batch" in str(error))
    return False


if __name__ == "__main__":
    main(*sys.argv[1:])
