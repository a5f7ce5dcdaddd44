"""FFNs of linear projections: their neurons read as rows, written back, and run.

Other kinds of FFN get a room like this one, with the same verbs: `read_ffn`, `projection_tensors`, `run_ffn`, and
`capture`, which shows what runs through the projections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..fusing.weights import FFNWeights
from .find import FFN
from .originals import original_parameter


def read_ffn(ffn: FFN) -> FFNWeights:
    """The weights of an FFN, one row a neuron.

    Args:
        ffn: an FFN whose projections hold floating-point weights.

    Returns:
        Views of the model's own weights, detached; nothing is copied but what is dequantised or gathered.

    Raises:
        ValueError: if a projection's weight is not a floating-point matrix (quantised by a method that is not
            known, or on the meta device).
        RuntimeError: if the original weights were dropped.
    """
    *ins, out = [_matrix(module, name) for module, name in zip(ffn.base_projections, ffn.projection_names, strict=True)]
    *in_biases, out_bias = [original_parameter(module, "bias") for module in ffn.base_projections]
    if ffn.layout.stacked:
        ins = list(ffn.layout.split(ins[0]))
        in_biases = [None, None] if in_biases[0] is None else list(ffn.layout.split(in_biases[0]))
    return FFNWeights(tuple(ins), tuple(in_biases), out.T, out_bias)


def projection_tensors(weights: FFNWeights, ffn: FFN) -> list[tuple[Tensor, Tensor | None]]:
    """What each projection of an FFN has to hold to have these weights; what `read_ffn` reads, written back.

    Args:
        weights: an FFN's weights, of any width.
        ffn: says how its projections store them.

    Returns:
        For each projection, the out-projection last, its weight of shape (out_features, in_features) and its
        bias of shape (out_features,) or None.
    """
    ins = zip(by_projection(weights.in_weights, ffn), by_projection(weights.in_biases, ffn), strict=True)
    written = [(weight, bias) for weight, bias in ins if weight is not None]
    return [*written, (weights.out_weight.T, weights.out_bias)]


def by_projection(pieces: Sequence[Tensor | None], ffn: FFN) -> list[Tensor | None]:
    """One tensor for each in-projection, from one for what is activated and, in a gated FFN, one for its factor.

    Args:
        pieces: tensors of shape (neurons, ...), or None for both.
        ffn: says whether one in-projection holds both.
    """
    if not ffn.layout.stacked:
        return list(pieces)
    present = [piece for piece in pieces if piece is not None]
    return [ffn.layout.join(present) if present else None]


def run_ffn(ffn: FFN, projections: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    """What an FFN with these projections puts out, without dropout.

    Args:
        ffn: for the layout and the activation.
        projections: one for each of the layout's, the out-projection last: the FFN's own, or narrow ones.
        x: tensor of shape (..., in_dim).

    Returns:
        Tensor of shape (..., out_dim).

    Raises:
        ValueError: if the layout does not say where the activation is.
    """
    *ins, out = projections
    return out(hidden_activations(ffn, [project(x) for project in ins]))


def hidden_activations(ffn: FFN, put: Sequence[Tensor]) -> Tensor:
    """What goes into an FFN's out-projection, without dropout.

    Args:
        ffn: for the layout and the activation.
        put: what each in-projection puts out, tensors of shape (..., out_features).

    Returns:
        Tensor of shape (..., neurons).

    Raises:
        ValueError: if the layout does not say where the activation is.
    """
    pieces = ffn.layout.split(put[0], dim=-1) if ffn.layout.stacked else put
    hidden = find_activation(ffn)(pieces[0])
    return hidden * pieces[1] if ffn.layout.gated else hidden


def find_activation(ffn: FFN) -> Callable[[Tensor], Tensor]:
    """An FFN's activation.

    Raises:
        ValueError: if the layout does not say where it is.
    """
    if ffn.activation is None:
        raise ValueError(
            f"The activation of the FFN {ffn.name!r} was not found at {ffn.layout.activations}. Register a layout "
            "that names it: `FFNLayout(..., activations=(...,))`."
        )
    return ffn.activation


def check_finite(weights: FFNWeights, ffn: FFN) -> None:
    """Refuses weights that no clustering can use.

    Raises:
        ValueError: naming the first projection with a NaN or infinite entry.
    """
    for name, (weight, bias) in zip(ffn.projection_names, projection_tensors(weights, ffn), strict=True):
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
