"""Shared fixtures: no hub, quiet libraries, few threads."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from transformers.utils import logging  # noqa: E402

import peft_fusion  # noqa: E402, F401

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)  # the models are tiny; two threads on a busy machine wait for each other


@pytest.fixture
def unchanged():
    """A check that a refused call left a model exactly as it was: `check = unchanged(model)`, then `check()`."""

    def snapshot(model: nn.Module):
        modules = [(name, id(module)) for name, module in model.named_modules()]
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        training = model.training

        def check() -> None:
            assert [(name, id(module)) for name, module in model.named_modules()] == modules
            assert model.state_dict().keys() == tensors.keys()
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor.nan_to_num(), tensors[name].nan_to_num()), name
            assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
            assert model.training == training
            assert not getattr(model, "peft_config", None)

        return check

    return snapshot
