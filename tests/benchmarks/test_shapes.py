"""What the benchmarks of time and memory measure has the parts that a real calibrated model has."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from peft import get_peft_model
from torch import nn

from peft_fusion import FusionConfig, calibrate

SIZES = {"layers": 1, "hidden": 48, "width": 32, "vocabulary": 64}


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("shapes")
    del sys.modules["shapes"]


def parts(model: nn.Module) -> dict[str, tuple]:
    """Name -> shape, dtype and whether it trains, of every parameter and buffer."""
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    return {name: (tuple(t.shape), t.dtype, trains.get(name)) for name, t in model.state_dict().items()}


def test_made_up_models_have_the_parts_of_calibrated_ones(shapes):
    model, config = shapes.llama(**SIZES), FusionConfig(ratio=0.5)
    calibrate(model, config, [shapes.batch(8, 6, SIZES["vocabulary"])])
    calibrated = get_peft_model(model, config)
    assert config.fused_by["scale"] == "ntk"
    assert parts(shapes.fused(0.5, **SIZES)) == parts(calibrated)


def test_as_much_trains_as_in_the_native_model(shapes):
    fused, native = shapes.fused(0.5, **SIZES), shapes.native(0.5, **SIZES)
    assert sum(p.numel() for p in shapes.trainable(fused)) == sum(p.numel() for p in shapes.trainable(native))
