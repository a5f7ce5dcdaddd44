"""The plain `Trainer`, as the examples call it."""

from __future__ import annotations

import torch


class Linear(torch.nn.Linear):
    def forward(self, x, labels):
        return {"loss": (super().forward(x) - labels).square().mean()}


def test_settings_reach_the_optimizer(example):
    """The fields of a preset win over those of the examples, and are what the `Trainer` works with."""
    trainer, _ = example("common.fine_tuning").fine_tune(
        Linear(1, 1),
        [{"x": [1.0], "labels": [2.0]}] * 4,
        lambda rows: {key: torch.tensor([row[key] for row in rows]) for key in rows[0]},
        title="test",
        steps=2,
        batch_size=2,
        learning_rate=1e-3,
        settings=example("common.paper_preset").PAPER_UNDERSTANDING["settings"],
    )
    group = trainer.optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.98), 1e-6, 0.1)
    assert trainer.args.lr_scheduler_type == "polynomial"
