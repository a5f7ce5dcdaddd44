"""Between a model's projections and `FFNWeights`: one row a neuron, whatever the layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..fusing.weights import FFNWeights
from .find import FFN
from .layouts import FFNLayout
from .originals import original_parameter


def read_ffn(ffn: FFN) -> FFNWeights:
    """The weights of an FFN, one row a neuron.

    Args:
        ffn: an FFN whose projections hold floating-point weights.

    Returns:
        Views of the model's own weights, detached; nothing is copied but what is dequantised or gathered.

    Raises:
        ValueError: if a projection's weight is not a floating-point matrix of the declared shape (quantised,
            by a method that is not known, or on the meta device).
    """
    matrices = [_matrix(module, name) for module, name in zip(ffn.base_projections, ffn.projection_names, strict=True)]
    biases = [_bias(module) for module in ffn.base_projections]
    in_weights: tuple[Tensor, ...] = tuple(matrices[:-1])
    in_biases: tuple[Tensor | None, ...] = tuple(biases[:-1])
    if ffn.layout.stacked:
        bias = in_biases[0]
        in_weights = in_weights[0].chunk(2)
        in_biases = (None, None) if bias is None else bias.chunk(2)
    return FFNWeights(in_weights, in_biases, matrices[-1].T, biases[-1])


def projection_tensors(weights: FFNWeights, layout: FFNLayout) -> list[tuple[Tensor, Tensor | None]]:
    """What each projection of a layout has to hold to be the FFN of these weights.

    Args:
        weights: an FFN's weights.
        layout: the layout to write them in.

    Returns:
        For each projection, the out-projection last, its weight of shape (out_features, in_features) and its
        bias of shape (out_features,) or None.
    """
    if not layout.stacked:
        ins = list(zip(weights.in_weights, weights.in_biases, strict=True))
    else:
        biases = [bias for bias in weights.in_biases if bias is not None]
        ins = [(torch.cat(weights.in_weights), torch.cat(biases) if biases else None)]
    return [*ins, (weights.out_weight.T, weights.out_bias)]


def check_finite(weights: FFNWeights, ffn: FFN) -> None:
    """Refuses weights that no clustering can use.

    Raises:
        ValueError: naming the first projection with a NaN or infinite entry.
    """
    tensors = projection_tensors(weights, ffn.layout)
    for name, (weight, bias) in zip(ffn.projection_names, tensors, strict=True):
        for kind, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"`{name}.{kind}` holds NaN or infinite values, so its FFN cannot be fused. "
                    "Repair the checkpoint, or leave the FFN out with `exclude_modules`."
                )


def _matrix(module: nn.Module, name: str) -> Tensor:
    """The weight of a linear module as (out_features, in_features)."""
    weight = original_parameter(module, "weight")
    readable = isinstance(weight, Tensor) and not weight.is_meta and weight.is_floating_point() and weight.dim() == 2
    if weight is None or not readable or weight.element_size() < 2:  # 8-bit floats have scales of their own
        shape = tuple(getattr(weight, "shape", ()))
        raise ValueError(
            f"`{name}.weight` ({type(module).__name__}, {getattr(weight, 'dtype', None)}, shape {shape}, device "
            f"{getattr(weight, 'device', None)}) cannot be read as a floating-point matrix. Load the model "
            "with its weights in memory, and unquantised or quantised by bitsandbytes or torchao, before fusing."
        )
    return weight.T if isinstance(module, Conv1D) else weight


def _bias(module: nn.Module) -> Tensor | None:
    return original_parameter(module, "bias")
