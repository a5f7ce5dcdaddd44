"""One of two CPU processes that distil a model together. Started by test_distilling.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from architectures import BY_NAME
from cases import narrow_state
from helpers import half
from peft import get_peft_model
from torch import Tensor
from transformers import TrainingArguments

from peft_fusion import distill

LLAMA = BY_NAME["llama"]
STEPS = 3


def data() -> list[dict[str, Tensor]]:
    return [{"input_ids": LLAMA.batch(seed=seed, size=8)["input_ids"]} for seed in range(8)]


def distilled(folder: str, world: int, own: bool = False) -> dict[str, Tensor]:
    """The narrow weights of a Llama after some steps on batches of eight, and the distances."""
    model = get_peft_model(LLAMA.make(), half(LLAMA, layers_to_transform=[1, 2]))
    settings: dict[str, Any] = {"max_steps": STEPS, "learning_rate": 3e-3, "report_to": "none", "use_cpu": True}
    settings |= {"per_device_train_batch_size": 8 // world, "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=folder, **settings)
    found = distill(model, None if own else data(), tokens=2048 if own else None, args=arguments)
    return narrow_state(model) | {"distances": torch.tensor([found.before, found.after])}


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())  # what drew from the global generator would come to differ
    found = {"data": distilled(folder, 2), "own text": distilled(folder, 2, own=True)}
    torch.save(found, Path(folder, f"rank{dist.get_rank()}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
