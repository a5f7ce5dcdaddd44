"""What trains beside the FFNs of a fused model, and the LoRA that every example compares with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the heavy imports stand in the functions, as in quickstart_methods.py
    from peft import PeftModel
    from transformers import PreTrainedModel


def with_lora(model: PreTrainedModel, task_type: str) -> PeftModel:
    """The LoRA that every example compares with."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type=task_type, r=16, lora_alpha=32, target_modules="all-linear"))


def head(model: PreTrainedModel) -> list[str]:
    """What trains beside the FFNs: PEFT adds the classifier, but BERT's pooler is a part of the head as well."""
    return [name for name, _ in model.named_modules() if name.endswith("pooler")]


def attention(model: PreTrainedModel) -> list[str]:
    """The attention of every layer, for `modules_to_save`: what trains beside the FFNs where memory allows it."""
    return [name for name, _ in model.named_modules() if name.split(".")[-1] in ("attention", "attn")]
