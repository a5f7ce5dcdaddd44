"""The host model beneath all that PEFT, accelerate and Trainer put around it."""

from __future__ import annotations

from accelerate.utils import extract_model_from_parallel
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model whose modules the FFNs are in: what was loaded, with any adapter layers in place.

    Args:
        model: a model, a `PeftModel` or `PeftMixedModel` of it, or either as accelerate or Trainer wraps it
            (data parallel, compiled). It is not changed.
    """
    inner = None
    while inner is not model:
        inner = model
        model = extract_model_from_parallel(model, keep_torch_compile=False)
        if isinstance(model, (PeftModel, PeftMixedModel)):
            model = model.base_model
        if isinstance(model, BaseTuner):
            model = model.model
    return model
