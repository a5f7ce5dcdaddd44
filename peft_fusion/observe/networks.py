"""The two networks that are compared: a fused model and its original, each run without leaving a trace."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..ffn import FFN, find_ffns
from ..tuner.layer import FusionLayer
from ..tuner.narrow import NarrowProjection
from .batches import Batch


@dataclass(frozen=True)
class Network:
    """One of the two networks.

    Args:
        model: the transformers model (or module) that is called, adapters beneath it included.
        ffns: those of its FFNs that are compared, in the model's order.
        fused: whether its fusion layers, where there are any, show their narrow FFN.
    """

    model: nn.Module
    ffns: list[FFN]
    fused: bool

    @property
    def device(self) -> torch.device:
        """Where its inputs belong."""
        return next(self.model.parameters()).device

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether it is an encoder-decoder."""
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

    @contextmanager
    def running(self) -> Iterator[None]:
        """In eval mode, nothing requiring a gradient, its FFNs shown; all is as it was afterwards."""
        training = {module: module.training for module in self.model.modules()}
        trainable = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        disabled = {layer: layer.disable_adapters for layer in fusion_layers(self.model)}
        try:
            for layer in disabled:
                layer.enable_adapters(self.fused)
            self.model.eval().requires_grad_(False)
            yield
        finally:
            for layer, was in disabled.items():
                layer.enable_adapters(not was)
            for name, parameter in self.model.named_parameters():  # offloaded ones are new objects by now
                parameter.requires_grad_(trainable[name])
            for module, mode in training.items():
                module.training = mode

    def __call__(self, batch: Batch, hidden_states: bool = True) -> Any:
        """The model's output.

        Args:
            batch: the model's inputs.
            hidden_states: whether to ask a transformers model for those of every layer. It does that by hooks, which
                it keeps.

        Raises:
            ValueError: if the batch is not what the model takes.
        """
        accepted = inspect.signature(self.model.forward).parameters
        extra = {"use_cache": False} if "use_cache" in accepted else {}
        if hidden_states and isinstance(self.model, PreTrainedModel):
            extra["output_hidden_states"] = True
        inputs = {key: v.to(self.device) if isinstance(v, Tensor) else v for key, v in batch.items()}
        try:
            return self.model(**inputs, **extra)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(
                f"{type(self.model).__name__} does not take a batch with the keys {sorted(batch)}: {error}. "
                f"Its forward has the arguments {[name for name in accepted if name not in ('args', 'kwargs')][:8]}."
            ) from error


def fusion_layers(model: nn.Module) -> list[FusionLayer]:
    """The projections of a model that carry a fusion adapter."""
    return [module for module in model.modules() if isinstance(module, FusionLayer)]


def active_narrow(layer: FusionLayer) -> nn.Module | None:
    """The narrow projection that a layer shows, or None if none of its adapters is active."""
    active: Any = layer.active_adapters
    return next((layer.mlp_fusion_narrow[name] for name in active if name in layer.mlp_fusion_narrow), None)


def linear_modules(projection: nn.Module, fused: bool) -> list[nn.Module]:
    """The modules that hold a projection's weights: the original's or, for a fused one, the narrow ones."""
    if isinstance(projection, FusionLayer):
        narrow = active_narrow(projection) if fused else None
        projection = narrow if narrow is not None else projection.base_layer
    return [module for module in projection.modules() if isinstance(module, (nn.Linear, Conv1D, NarrowProjection))]


def pair(model: nn.Module, reference: nn.Module | None) -> tuple[Network, Network]:
    """The original and the fused network, with the FFNs that differ matched by name.

    Args:
        model: a model with a fusion adapter, or one that was made narrow for good.
        reference: the original; None: the same model with its original FFNs.

    Returns:
        The original, then the fused one.

    Raises:
        ValueError: if there is no original to compare with, an adapter is merged, or FFNs are missing in one of them.
    """
    model = _unwrapped(model)
    if any(layer.merged for layer in fusion_layers(model)):
        raise ValueError(
            "The fusion adapter is merged, so that its original FFNs are not in place. Call `unmerge_adapter()` first."
        )
    fused = [ffn for ffn in find_ffns(model) if _carries_adapter(ffn)]
    if reference is None:
        if not fused:
            raise ValueError(
                f"{type(model).__name__} has no active fusion adapter, so there is no original to compare it with. "
                "Give the original model as `reference`."
            )
        return Network(model, fused, False), Network(model, fused, True)
    reference = _unwrapped(reference)
    originals = {ffn.name: ffn for ffn in find_ffns(reference)}
    fused = fused or _of_other_width(find_ffns(model), originals)
    missing = [ffn.name for ffn in fused if ffn.name not in originals]
    if missing or not fused:
        raise ValueError(
            f"The reference ({type(reference).__name__}) has no FFN named {missing[0] if missing else 'as the model'}; "
            f"it has {sorted(originals)[:4]}. Give the model that was fused."
        )
    return Network(reference, [originals[ffn.name] for ffn in fused], False), Network(model, fused, True)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model beneath what PEFT and data parallelism put around it."""
    model = extract_model_from_parallel(model)
    if isinstance(model, (PeftModel, PeftMixedModel)):
        model = model.base_model
    return model.model if isinstance(model, BaseTuner) else model


def _carries_adapter(ffn: FFN) -> bool:
    out = ffn.projections[-1]
    return isinstance(out, FusionLayer) and active_narrow(out) is not None


def _of_other_width(ffns: list[FFN], originals: Mapping[str, FFN]) -> list[FFN]:
    """The FFNs whose width is not the original one's; all of them if there is none."""
    narrow = [ffn for ffn in ffns if ffn.name in originals and originals[ffn.name].width != ffn.width]
    return narrow or ffns
