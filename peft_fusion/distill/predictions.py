"""What is distilled: the predictions of the original and of the narrow model, and how far they are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..observe.batches import padding_mask
from ..observe.divergence import kl_divergences
from ..observe.networks import Network, fusion_layers
from ..observe.outputs import has_trained_head, run_whole, speaks
from ..observe.unwrap import unwrapped
from ..tuner.layer import FusionLayer
from ..tuner.showing import showing

OUTPUTS = ("auto", "logits", "hidden_states")


class Predictions:
    """The predictions of a model to be learnt from, and of one that learns.

    Args:
        outputs: "logits", whose Kullback-Leibler divergence in nats is the distance, or "hidden_states" behind the last
            layer, with their squared distance relative to the teacher's squared length.
        is_encoder_decoder: whether the model is one.
    """

    def __init__(self, outputs: str, is_encoder_decoder: bool) -> None:
        self.outputs, self._is_encoder_decoder = outputs, is_encoder_decoder

    def of(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The predictions at every position that counts, shape (positions, classes or dim).

        Args:
            model: the model as it is called, wrapped or not.
            batch: its inputs.
        """
        hidden, output = run_whole(Network(unwrapped(model), [], fused=True), batch, through=model)
        value = getattr(output, "logits", None) if self.outputs == "logits" else hidden
        if not isinstance(value, Tensor):
            raise ValueError(f"{type(unwrapped(model)).__name__} puts out no {self.outputs}: choose other `outputs`.")
        mask = padding_mask(batch, value.shape, self._is_encoder_decoder)
        return value.flatten(0, -2) if mask is None else value[mask.to(value.device)]

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The mean over positions; differentiable by `student`. `teacher` may be overwritten."""
        if self.outputs == "logits":
            return kl_divergences(student, teacher).mean()
        ours, theirs = student.float(), teacher.float()
        return (ours - theirs).square().sum() / theirs.square().sum().clamp(min=1e-30)


def chosen_outputs(network: Network, batch: Mapping[str, Any]) -> str:
    """What "auto" comes to: a head's logits if it is trained, else the hidden states.

    A language model's head is. Any other is taken for new if all its biases are zero, as they are before training.

    Args:
        network: the original, running.
        batch: any.
    """
    with torch.no_grad():
        hidden, output = run_whole(network, batch)
    logits = getattr(output, "logits", None)
    if logits is not None and (hidden is None or speaks(hidden, logits) or has_trained_head(network.model)):
        return "logits"
    return "hidden_states"


@contextmanager
def original_shown(model: nn.Module) -> Iterator[None]:
    """Has a model compute what its original does, in eval mode, and nothing that trains has a part in it.

    Args:
        model: the model, without wrappers.

    Raises:
        RuntimeError: if the original weights were dropped.
    """
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        for module in model.modules():
            adapts = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not isinstance(
                module, FusionLayer
            )
            if adapts and any(parameter.requires_grad for parameter in module.parameters()):
                stack.callback(setattr, module, "_disable_adapters", module._disable_adapters)
                vars(module)["_disable_adapters"] = True
        try:
            with showing(fusion_layers(model), originals=True):
                model.eval()
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode
