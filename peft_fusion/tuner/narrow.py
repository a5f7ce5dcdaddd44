"""The narrow projections that an adapter trains, and the plain ones that they are merged to."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..ffn import blank_like, is_quantised


class Narrow(nn.Module):
    """What an adapter trains in the place of one module: weights and, where there are any, fixed scales of neurons.

    It is a leaf that owns its scales, so that FSDP may shard it on its own, and it is not an `nn.Linear`, so that
    LoRA's "all-linear" leaves it alone. `shapes` are those of all of its tensors, scales that it may get included.
    """

    scale: Tensor | None
    shapes: dict[str, tuple[int, ...]]

    @property
    def scaled(self) -> set[bool]:
        """For each of its scales, whether it multiplies hidden activations."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Loads what a state dict holds of this module, which then has the scales that are in it."""
        held = {name for name in (*self._parameters, *self._buffers) if prefix + name in state_dict}
        missing = [name for name, parameter in self._parameters.items() if parameter is not None and name not in held]
        if held and missing:
            raise ValueError(
                f"The state dict holds {prefix + min(held)!r}, but not {prefix + missing[0]!r}: a narrow projection is "
                "loaded as a whole."
            )
        for name, buffer in list(self._buffers.items()) if held else ():
            stored = state_dict.get(prefix + name) if name in self.shapes else buffer
            if stored is None or buffer is None:
                device = next(self.parameters()).device
                setattr(self, name, None if stored is None else torch.empty_like(stored, device=device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class NarrowProjection(Narrow):
    """One projection of a narrow FFN: trainable weights and, where there is one, a fixed scale of the neurons.

    Args:
        weight: tensor of shape (out_features, in_features).
        bias: tensor of shape (out_features,), or None.
        scale: tensor of shape (neurons,), or None for 1.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.register_buffer("scale", scale)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}

    def linear(self, x: Tensor) -> Tensor:
        """The linear map in the input's dtype: full-precision weights of a half-precision model stay masters."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the plain projection with the same output, the scale multiplied in."""
        raise NotImplementedError

    @property
    def scaled(self) -> set[bool]:
        return set() if self.scale is None else {isinstance(self, NarrowOutProjection)}


class NarrowInProjection(NarrowProjection):
    """In-projection of a narrow FFN; its scale multiplies what it puts out, neuron by neuron."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> None:
        super().__init__(weight, bias, scale)
        self.shapes["scale"] = (len(weight),)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., neurons)."""
        out = self.linear(x)
        return out if self.scale is None else (out * self.scale).to(out.dtype)  # under autocast not the input's

    def folded(self) -> tuple[Tensor, Tensor | None]:
        if self.scale is None:
            return self.weight, self.bias
        return self.weight * self.scale.unsqueeze(1), None if self.bias is None else self.bias * self.scale


class NarrowOutProjection(NarrowProjection):
    """Out-projection of a narrow FFN; its scale is the paper's P and multiplies the hidden activations."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> None:
        super().__init__(weight, bias, scale)
        self.shapes["scale"] = (weight.shape[1],)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., neurons) to (..., out_features)."""
        return self.linear(x if self.scale is None else (x * self.scale).to(x.dtype))

    def folded(self) -> tuple[Tensor, Tensor | None]:
        return (self.weight if self.scale is None else self.weight * self.scale), self.bias


class LowRankProjection(NarrowProjection):
    """A projection as the product of two thin matrices (the baseline "svd").

    Args:
        weight: tensor of shape (out_features, rank).
        weight_in: tensor of shape (rank, in_features).
        bias: tensor of shape (out_features,), or None.
    """

    def __init__(self, weight: Tensor, weight_in: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias, None)
        self.weight_in = nn.Parameter(weight_in)
        self.shapes["weight_in"] = tuple(weight_in.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        return self.linear(F.linear(x, self.weight_in.to(x.dtype)))

    def folded(self) -> tuple[Tensor, Tensor | None]:
        return self.weight @ self.weight_in, self.bias


def plain_projection(
    original: nn.Module, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
) -> nn.Module:
    """A plain linear module of the kind, dtype and device of another, with other weights.

    Args:
        original: an `nn.Linear` (or a subclass without state of its own) or a `Conv1D`.
        weight: tensor of shape (out_features, in_features).
        bias: tensor of shape (out_features,), or None.
        dtype: the model's, which a quantised original does not tell; the result is a plain `nn.Linear` then.
    """
    out_features, in_features = weight.shape
    like, trains = blank_like(original), next(original.parameters()).requires_grad
    module: nn.Module
    if isinstance(original, Conv1D):
        with torch.device("meta"):  # which draws no random numbers
            module = Conv1D(out_features, in_features)
        weight = weight.T.contiguous()
    else:
        kind = nn.Linear if is_quantised(original) else type(original)
        module = linear = kind.__new__(kind)
        nn.Linear.__init__(linear, in_features, out_features, bias is not None, device="meta")  # type: ignore[arg-type]
    if dtype is not None and is_quantised(original):
        like = like.to(dtype)
    module.weight = nn.Parameter(weight.to(like, copy=True), requires_grad=trains)
    if bias is not None:
        module.bias = nn.Parameter(bias.to(like, copy=True), requires_grad=trains)
    return module.train(original.training)
