"""The host model beneath all that PEFT, accelerate and Trainer put around it, held whole by each process."""

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


def require_whole(model: nn.Module) -> None:
    """Refuses a model of whose weights each process holds a part.

    Args:
        model: the model, without wrappers.

    Raises:
        ValueError: naming what has parted them.
    """
    marks = {"ds_id": "DeepSpeed ZeRO-3", "to_local": "FSDP2 or tensor parallelism"}  # torch may lack the classes
    how = next((how for mark, how in marks.items() if any(hasattr(p, mark) for p in model.parameters())), None)
    if any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules()):
        how = "FSDP"
    if how:
        raise ValueError(
            f"Each process holds only a part of the weights of this {type(model).__name__} ({how}), and here a model "
            "is looked at as a whole. Do this where a process holds all of it, save the adapter, and load that in "
            "every process of the sharded training (docs/scale.md)."
        )
