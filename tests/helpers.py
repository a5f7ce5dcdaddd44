"""What most tests do with a tiny model: run it, train it, and fuse it to half its width."""

from __future__ import annotations

import torch
from architectures import Architecture
from torch import nn

from peft_fusion import FusionConfig


def logits(model: nn.Module, architecture: Architecture) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**architecture.batch()).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def train(model: nn.Module, architecture: Architecture, steps: int = 3) -> None:
    model.train()
    torch.manual_seed(0)  # for the dropout
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        loss = model(**architecture.batch(labels=True, seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def half(architecture: Architecture, **kwargs) -> FusionConfig:
    return FusionConfig(ratio=0.5, task_type=architecture.task_type, **kwargs)
