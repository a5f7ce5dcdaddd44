"""What a network puts out: its hidden states, and what it is there for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ffn import watch
from .batches import Batch
from .networks import Network


def run_whole(network: Network, batch: Batch, through: nn.Module | None = None) -> tuple[Tensor | None, Any]:
    """The hidden states behind the last layer (an encoder-decoder's decoder), and the model's output.

    Args:
        network: the network.
        batch: its inputs.
        through: what wraps its model, to be called in its place.
    """
    model: Any = network.model
    backbone = getattr(model, "base_model", model)
    if backbone is model and network.is_encoder_decoder and hasattr(model, "get_decoder"):
        backbone = model.get_decoder()
    hidden: list[Tensor | None] = [None]

    def note(module: nn.Module, args: Any, output: Any) -> None:
        hidden[0] = getattr(output, "last_hidden_state", None)

    with watch([backbone], after=note):
        output = network(batch, through=through)
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
