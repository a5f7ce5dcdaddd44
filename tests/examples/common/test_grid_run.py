"""One run of the grid: what trains in which row."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from architectures import BY_NAME
from helpers import logits

BERT = BY_NAME["bert"]


@pytest.fixture
def grid_run(example) -> ModuleType:
    return example("common.grid_run")


def prepare(grid_run: ModuleType, row: str, ratio: float) -> torch.nn.Module:
    options = dict.fromkeys(("model", "dataset", "steps", "epochs", "test"))
    setting = grid_run.Setting(**options, layers="1-2", learning_rate=1e-4, sequences=1, compared_seed=0, training={})
    return grid_run.prepare(
        BERT.make(), grid_run.METHODS[row], ratio, 0, setting, [BERT.batch(seed=i, size=8) for i in range(8)]
    )


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_ffns_and_head_train_at_full_width_from_where_they_were(grid_run):
    row = "full, FFNs and head"
    assert row in grid_run.FULL_WIDTH
    prepared, plain = prepare(grid_run, row, 1.0), BERT.make()
    assert torch.equal(logits(prepared, BERT), logits(plain, BERT))
    parts = ("layer.1.intermediate", "layer.1.output.dense", "layer.2.intermediate", "layer.2.output.dense", "pooler")
    expected = [p for name, p in plain.named_parameters() if any(part in name for part in (*parts, "classifier"))]
    assert sum(p.numel() for p in prepared.parameters() if p.requires_grad) == sum(p.numel() for p in expected)


def test_attention_trains_where_the_row_says_so(grid_run):
    rows = ("calibrated: pruning", "calibrated: pruning, attention trains")
    alone, beside = (trained(prepare(grid_run, row, 0.5)) for row in rows)
    more = beside - alone
    assert alone < beside and all("attention" in name for name in more)
    assert {name.split("layer.")[1][0] for name in more} == {"0", "1", "2"}
