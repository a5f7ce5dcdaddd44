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


def predicted(network: Network, batch: Batch) -> tuple[Tensor, bool]:
    """What is taken for a model's predictions: a language model's logits, else its last hidden states.

    Any other head is mostly new, and sees few directions.

    Args:
        network: the network.
        batch: its inputs.

    Returns:
        Tensor of shape (..., classes or dim), and whether it holds logits.
    """
    hidden, output = run_whole(network, batch)
    logits = getattr(output, "logits", None)
    if logits is not None and speaks(hidden, logits):
        return logits, True
    value = hidden if hidden is not None else main_output(output)
    assert value is not None
    return value, False


def main_output(output: Any) -> Tensor | None:
    """What a model is there for: logits, else hidden states, else its first tensor."""
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return output[name] if isinstance(output, dict) else getattr(output, name)
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    return next((value for value in values if isinstance(value, Tensor)), None)


def speaks(hidden: Tensor | None, logits: Tensor | None) -> bool:
    """Whether logits are those of a language model: at every position, of more classes than hidden states have dims."""
    return logits is not None and logits.dim() > 2 and (hidden is None or logits.shape[-1] > hidden.shape[-1])


def has_trained_head(model: nn.Module) -> bool:
    """Whether a model's head, any part of it that is not its backbone, has been trained: not all biases are zero.

    Before training all of them are; a head without a bias does not tell, and is taken to be new.
    """
    prefix = getattr(model, "base_model_prefix", "") or "\0"
    biases = (p for name, p in model.named_parameters() if "bias" in name and not name.startswith(prefix))
    return any(bool(bias.any()) for bias in biases)
