"""A network to look at: a model with its original or its narrow FFNs shown, run without leaving a trace."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..ffn import FFN, AnyFFN
from ..tuner.layer import FusionLayer
from ..tuner.narrow import NarrowProjection
from ..tuner.showing import showing
from .batches import Batch
from .unwrap import require_whole


@dataclass(frozen=True)
class Network:
    """A model with its original or with its narrow FFNs.

    Args:
        model: the transformers model (or module) that is called, adapters beneath it included.
        ffns: those of its FFNs that are looked at, in the model's order.
        fused: whether its fusion layers, where there are any, show their narrow FFN.
    """

    model: nn.Module
    ffns: Sequence[AnyFFN]
    fused: bool

    @property
    def dense(self) -> list[FFN]:
        """Those of the FFNs that are dense."""
        return [ffn for ffn in self.ffns if isinstance(ffn, FFN)]

    @property
    def device(self) -> torch.device:
        """Where its inputs belong; accelerate moves them on from there, if it has dispatched the model."""
        devices = (parameter.device for parameter in self.model.parameters())
        return next((device for device in devices if device.type != "meta"), torch.device("cpu"))

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether it is an encoder-decoder."""
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

    def of(self, ffns: Sequence[AnyFFN]) -> Network:
        """The same network, of which other FFNs are looked at."""
        return Network(self.model, ffns, self.fused)

    @contextmanager
    def running(self) -> Iterator[None]:
        """In eval mode, nothing requiring a gradient, its FFNs shown; all is as it was afterwards.

        Raises:
            ValueError: if each process holds a part of its weights.
        """
        require_whole(self.model)
        training = {module: module.training for module in self.model.modules()}
        trainable = {name: parameter.requires_grad for name, parameter in every_parameter(self.model)}
        try:
            with showing(fusion_layers(self.model), originals=not self.fused):
                self.model.eval().requires_grad_(False)
                yield
        finally:
            for name, parameter in every_parameter(self.model):  # offloaded ones are new objects by now
                parameter.requires_grad_(trainable[name])
            for module, mode in training.items():
                module.training = mode

    def __call__(
        self, batch: Batch, hidden_states: bool = False, logits: bool = True, through: nn.Module | None = None
    ) -> Any:
        """The model's output.

        Args:
            batch: the model's inputs.
            hidden_states: whether to ask a transformers model for those of every layer. It does that by hooks, which
                it keeps.
            logits: False: those of the last token alone will do, where a model can leave the others out.
            through: what wraps the model, for training on several devices say, and is called in its place.

        Raises:
            ValueError: if the batch is not what the model takes.
        """
        accepted = inspect.signature(self.model.forward).parameters
        extra: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        if hidden_states and isinstance(self.model, PreTrainedModel):
            extra["output_hidden_states"] = True
        if not logits and "logits_to_keep" in accepted and "labels" not in batch:
            extra["logits_to_keep"] = 1
        device = self.device
        inputs = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        try:
            return (self.model if through is None else through)(**inputs, **extra)
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error) or isinstance(error, UnusableActivations):
                raise
            raise ValueError(
                f"{type(self.model).__name__} cannot take a batch with {sorted(batch)}: {error}. Give batches as "
                f"`Trainer` would give them to it; its forward has the arguments "
                f"{[name for name in accepted if name not in ('args', 'kwargs')][:8]}."
            ) from error


def every_parameter(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A model's parameters by all of their names: tied ones are one, but no longer once they were fetched from disk."""
    return model.named_parameters(remove_duplicate=False)


class UnusableActivations(ValueError):
    """Activations that nothing can be learnt from; tells them from what the model itself raises."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device; it must never be taken for another failure."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def fusion_layers(model: nn.Module) -> list[FusionLayer]:
    """The projections of a model that carry a fusion adapter."""
    return [module for module in model.modules() if isinstance(module, FusionLayer)]


def active_narrow(layer: FusionLayer) -> nn.Module | None:
    """The narrow projection that a layer shows, or None if none of its adapters is active."""
    active: Any = layer.active_adapters
    return next((layer.mlp_fusion_narrow[name] for name in active if name in layer.mlp_fusion_narrow), None)


def shown(projection: nn.Module, fused: bool) -> nn.Module:
    """What stands in the place of a projection, or of routed experts: the original or, if asked for, a narrow one."""
    if not isinstance(projection, FusionLayer):
        return projection
    narrow = active_narrow(projection) if fused else None
    return projection.original_layer if narrow is None else narrow


def linear_modules(projection: nn.Module, fused: bool) -> list[nn.Module]:
    """The modules that hold a projection's weights: the original's or, for a fused one, the narrow ones."""
    kinds = (nn.Linear, Conv1D, NarrowProjection)
    return [module for module in shown(projection, fused).modules() if isinstance(module, kinds)]


def carries_adapter(ffn: AnyFFN) -> bool:
    """Whether an FFN shows a narrow one."""
    out = ffn.projections[-1]
    return isinstance(out, FusionLayer) and active_narrow(out) is not None
