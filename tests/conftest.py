"""Shared fixtures: no hub, quiet libraries, few threads."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from architectures import ALIKE, COMMON, Architecture  # noqa: E402
from state import HANDED_OVER, changes, state_of  # noqa: E402
from torch import nn  # noqa: E402
from transformers.utils import logging  # noqa: E402

import peft_fusion  # noqa: E402, F401

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)  # the models are tiny; two threads on a busy machine wait for each other


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is done on every architecture is slow on those whose layout another one has, or on all but a few."""
    for item in items:
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        names = {value.name for value in given if isinstance(value, Architecture)}
        rare = names.difference(COMMON) if item.get_closest_marker("common") else names.intersection(ALIKE)
        if rare:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def unchanged():
    """A check that a call left a model, and torch, exactly as they were: `check = unchanged(model)`, then `check()`.

    After a calibration that went well, `check(calibrated=True)`: what it found out waits on the model.
    """

    def snapshot(model: nn.Module):
        before = state_of(model)

        def check(calibrated: bool = False) -> None:
            assert changes(before, state_of(model), f".{HANDED_OVER}" if calibrated else "") == []

        return check

    return snapshot


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps the precision of its first `Accelerator` for the whole process; tests ask for different ones."""
    AcceleratorState._reset_state(reset_partial_state=True)
