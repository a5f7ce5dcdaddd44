"""`Trainer` whose loss is the distance from the original's predictions."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..observe.shared_layers import SharedLayers
from ..observe.unwrap import unwrapped
from .predictions import Predictions, original_shown


class Distillation(Trainer):
    """Trains a model to predict what its original predicts; everything else is `Trainer`'s.

    Args:
        predictions: what is compared.
        teacher: the model to learn from; None: the original that the model itself holds.
        shared: layers that the model shares with that original, if any.
        given: see `Trainer`.
    """

    def __init__(
        self, *, predictions: Predictions, teacher: nn.Module | None, shared: SharedLayers | None, **given: Any
    ) -> None:
        super().__init__(**given)
        self._predictions, self._teacher, self._shared = predictions, teacher, shared
        self.model_accepts_loss_kwargs = False  # the loss is a mean, so that `Trainer` divides by accumulated steps

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The distance of the model's predictions from the original's.

        Dropout is off: what is to be learnt is a function, and noise in it is nothing that the original predicts.
        """
        for module in model.modules():  # `Trainer` sets modes anew for each step; checkpointed layers need theirs
            module.training = module.training and bool(getattr(module, "gradient_checkpointing", False))
        with torch.no_grad(), self._shared.noting() if self._shared else nullcontext():
            theirs = self._taught(model, inputs)
        with self._shared.skipped() if self._shared else nullcontext():
            ours = self._predictions.of(model, inputs)
        loss = self._predictions.distance(ours, theirs)
        return (loss, {"logits": ours}) if return_outputs else loss

    def _taught(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self._teacher is not None:
            return self._predictions.of(self._teacher, inputs)
        with original_shown(unwrapped(model)):
            return self._predictions.of(model, inputs)

    def get_eval_dataloader(self, *given: Any) -> DataLoader:
        """Every held-out sequence counts, also where training drops batches that are not full."""
        dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*given)
        finally:
            self.args.dataloader_drop_last = dropped

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, None, None]:
        """The distance alone; predictions of a whole vocabulary are nothing to collect."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None


class BestWeights(TrainerCallback):
    """Keeps the weights of the lowest distance so far, in CPU memory.

    Args:
        host: the model.
        names: of its parameters that train. They may be other objects once training starts (FSDP).
    """

    def __init__(self, host: nn.Module, names: Sequence[str]) -> None:
        self._host, self._names = host, list(names)
        self.first, self.best = float("nan"), float("inf")
        self.keep()

    def keep(self) -> None:
        """Takes the weights as they are for the best."""
        self._kept = [tensor.to("cpu", copy=True) for tensor in self._tensors()]

    def put_back(self) -> None:
        """Writes the best weights into the parameters."""
        for tensor, kept in zip(self._tensors(), self._kept, strict=True):
            tensor.copy_(kept)

    def _tensors(self) -> list[Tensor]:
        """This rank's part of each parameter."""
        held = [self._host.get_parameter(name).detach() for name in self._names]
        return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in held]

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **given: Any,
    ) -> None:
        """Compares the weights with the best ones."""
        distance = (metrics or {}).get("eval_loss", float("inf"))
        if self.best == float("inf"):
            self.first = distance
        if distance < self.best:
            self.best = distance
            self.keep()


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Leaves every global random state as it was: `Trainer` seeds them all."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python = random.getstate()
    numpy = _numpy_random()
    before = numpy.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.set_state(before)


def _numpy_random() -> Any:
    import numpy

    return numpy.random
