"""The rows of the quickstart's table: how each method changes a classifier, and its learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .trainable_parts import head, with_lora

if TYPE_CHECKING:  # the heavy imports stand in the functions: listing the methods must not cost seconds
    from peft import PeftModel
    from transformers import PreTrainedModel


# What a method may look at: batches of the training inputs (a DataLoader), to calibrate on
Batches = Iterable[dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """`prepare(model, ratio, batches)` returns the model to train."""

    prepare: Callable[[PreTrainedModel, float, Batches], PreTrainedModel | PeftModel]
    learning_rate: float


def full_fine_tuning(model: PreTrainedModel, ratio: float, batches: Batches) -> PreTrainedModel:
    return model


def lora(model: PreTrainedModel, ratio: float, batches: Batches) -> PeftModel:
    return with_lora(model, "SEQ_CLS")


def fusion(model: PreTrainedModel, ratio: float, batches: Batches) -> PeftModel:
    from peft import get_peft_model

    from peft_fusion import FusionConfig

    return get_peft_model(model, FusionConfig(task_type="SEQ_CLS", ratio=ratio, modules_to_save=head(model)))


def calibrated_fusion(model: PreTrainedModel, ratio: float, batches: Batches) -> PeftModel:
    from peft import get_peft_model

    from peft_fusion import FusionConfig, calibrate

    config = FusionConfig(task_type="SEQ_CLS", ratio=ratio, modules_to_save=head(model))
    calibrate(model, config, batches, sequences=512)
    return get_peft_model(model, config)


METHODS = {
    "full fine-tuning": Method(full_fine_tuning, learning_rate=1e-4),
    "LoRA": Method(lora, learning_rate=1e-3),
    "fusion": Method(fusion, learning_rate=2e-4),
    "calibrated fusion": Method(calibrated_fusion, learning_rate=2e-4),
}
FUSED = ("fusion", "calibrated fusion")  # the methods whose saved and merged models are reloaded and checked
