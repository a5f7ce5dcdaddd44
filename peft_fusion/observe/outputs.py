"""What a network puts out: its hidden states, and what it is there for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ffn import watch
from .networks import Batch, Network


def run_whole(side: Network, batch: Batch) -> tuple[Tensor | None, Any]:
    """The hidden states behind the last layer (an encoder-decoder's decoder), and the model's output."""
    model: Any = side.model
    backbone = getattr(model, "base_model", model)
    if backbone is model and side.is_encoder_decoder and hasattr(model, "get_decoder"):
        backbone = model.get_decoder()
    hidden: list[Tensor | None] = [None]

    def note(module: nn.Module, args: Any, output: Any) -> None:
        hidden[0] = getattr(output, "last_hidden_state", None)

    with watch([backbone], after=note):
        output = side(batch, hidden_states=False)
    return hidden[0], output


def main_output(output: Any) -> Tensor | None:
    """What a model is there for: logits, else hidden states, else its first tensor."""
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return output[name] if isinstance(output, dict) else getattr(output, name)
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    return next((value for value in values if isinstance(value, Tensor)), None)
