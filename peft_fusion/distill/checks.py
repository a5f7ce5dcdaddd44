"""What `distill` refuses before it does anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..observe.own_inputs import check_unused
from .predictions import OUTPUTS
from .setting import TRAINED


def check(
    data: Any,
    train: str,
    outputs: str,
    teacher: nn.Module | None,
    sampled: Mapping[str, Any],
    **numbers: Any,
) -> None:
    """Refuses what cannot be, before anything is done."""
    for name, value, known in (("train", train, TRAINED), ("outputs", outputs, OUTPUTS)):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {', '.join(known)}, but got {value!r}.")
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` must be an integer of at least 1, but got {value!r}.")
    check_unused(sampled, data, "data")
    if train == "all" and teacher is None:
        raise ValueError(
            '`train="all"` would change the original, which is the same model. Give a `teacher` of its own, or use '
            '`train="adapters"` with LoRA beside the narrow FFNs.'
        )


def check_engine(args: TrainingArguments | None) -> None:
    """Refuses an engine under which the original and the narrow model cannot be one model.

    Raises:
        ValueError: naming it.
    """
    plugin: Any = getattr(args, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            "`distill` runs two models of the same modules, which DeepSpeed ZeRO-3 does not know of when it fetches "
            "weights. Use DDP or FSDP, or distil in processes that hold all of the model."
        )
