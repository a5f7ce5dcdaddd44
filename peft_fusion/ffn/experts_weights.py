"""The weights of routed experts: read as rows of neurons, written back, scaled, and put into a module like theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType

import torch
from torch import Tensor, nn

from ..fusing.weights import FFNWeights
from .experts import Experts
from .experts_layout import ExpertsLayout
from .originals import original_parameter

WIDTHS = ("intermediate_dim", "intermediate_size", "expert_dim")  # attributes in which experts note their width


def read_experts(experts: Experts) -> list[FFNWeights]:
    """The weights of every expert, one row a neuron.

    Args:
        experts: whose parameters hold floating-point numbers.

    Returns:
        Views of the model's own weights, detached; nothing is copied but what is gathered.

    Raises:
        ValueError: if a parameter cannot be read (on the meta device, or quantised).
        RuntimeError: if the original weights were dropped.
    """
    layout = experts.layout
    ins, outs = (_matrices(experts, name) for name in (layout.in_projection, layout.out_projection))
    in_bias, out_bias = (
        original_parameter(experts.module, name) if layout.biased else None for name in layout.bias_names
    )
    result = []
    for index in range(experts.count):
        pieces = layout.split(ins[index])
        biases = layout.split(in_bias[index]) if in_bias is not None else (None,) * len(pieces)
        result.append(FFNWeights(pieces, biases, outs[index].T, None if out_bias is None else out_bias[index]))
    return result


def experts_tensors(weights: Sequence[FFNWeights], layout: ExpertsLayout) -> dict[str, Tensor]:
    """What the parameters have to be for every expert to have these weights; what `read_experts` reads, written back.

    Args:
        weights: of every expert, all of one width.
        layout: how they are stored.

    Returns:
        A parameter's name -> tensor, copied, with the experts first.
    """
    pieces = zip(*(w.in_weights for w in weights), strict=True)
    ins = layout.join([torch.stack(piece) for piece in pieces])
    outs = torch.stack([w.out_weight for w in weights])
    found = {
        layout.in_projection: ins.mT if layout.transposed else ins,
        layout.out_projection: outs if layout.transposed else outs.mT,
    }
    if layout.biased:
        in_name, out_name = layout.bias_names
        found[in_name] = layout.join(
            [torch.stack(piece) for piece in zip(*(w.in_biases for w in weights), strict=True)]
        )
        found[out_name] = torch.stack([w.out_bias for w in weights])  # type: ignore[misc]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def scaled_tensors(
    tensors: Mapping[str, Tensor], layout: ExpertsLayout, scale: Tensor | None, in_scale: Tensor | None
) -> dict[str, Tensor]:
    """The parameters with scales multiplied in, differentiable by what they were.

    Args:
        tensors: a parameter's name -> tensor.
        layout: how they are stored.
        scale: of the hidden activations, (experts, neurons); None for 1.
        in_scale: of what the in-projection puts out, (experts, its outputs) in its order; None for 1.
    """
    found = dict(tensors)
    if scale is not None:
        name = layout.out_projection
        found[name] = tensors[name] * scale.unsqueeze(2 if layout.transposed else 1)
    if in_scale is not None:
        name, bias = layout.in_projection, layout.bias_names[0]
        found[name] = tensors[name] * in_scale.unsqueeze(1 if layout.transposed else 2)
        if layout.biased:
            found[bias] = tensors[bias] * in_scale
    return found


def experts_like(original: nn.Module, tensors: Mapping[str, Tensor], width: int, trains: bool = False) -> nn.Module:
    """A module with the class, the code and the settings of another, and weights of its own.

    It is no deep copy: the config, through which the implementation is chosen, the activation and the norms are the
    original's. The class is not called, as what it takes differs from model to model.

    Args:
        original: the experts, beneath any adapter.
        tensors: a parameter's name -> its value, for every parameter.
        width: the neurons of each expert, noted where the original notes its own.
        trains: whether the parameters require a gradient.
    """
    made = original.__new__(type(original))
    nn.Module.__init__(made)
    owned = vars(made).keys()
    for name, value in vars(original).items():
        if name not in owned and name != "forward" and not name.startswith(("_mlp_fusion", "_hf_hook", "_old_forward")):
            vars(made)[name] = width if name in WIDTHS and isinstance(value, int) else value
    if isinstance(patched := vars(original).get("forward"), MethodType):  # what patches one module in place
        vars(made)["forward"] = MethodType(patched.__func__, made)
    made._parameters = {name: nn.Parameter(tensor, requires_grad=trains) for name, tensor in tensors.items()}
    made._buffers, made._modules = dict(original._buffers), dict(original._modules)
    return made.train(original.training)


def check_finite_experts(weights: Sequence[FFNWeights], experts: Experts) -> None:
    """Refuses weights that no clustering can use.

    Raises:
        ValueError: naming the first expert with a NaN or infinite entry.
    """
    for index, one in enumerate(weights):
        bias = one.blocks() if one.out_bias is None else [*one.blocks(), one.out_bias]
        if not all(bool(torch.isfinite(block).all()) for block in bias):
            raise ValueError(
                f"`{experts.name}` holds NaN or infinite values in expert {index}, so that it cannot be fused. Repair "
                "the checkpoint, or leave these experts out with `exclude_modules`."
            )


def _matrices(experts: Experts, name: str) -> Tensor:
    """A parameter as (experts, out_features, in_features)."""
    tensor = original_parameter(experts.module, name)
    readable = tensor is not None and tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.is_meta
    if tensor is None or not readable or type(tensor).__module__.startswith("torchao"):
        raise ValueError(
            f"`{experts.name}.{name}` ({getattr(tensor, 'dtype', None)}, device {getattr(tensor, 'device', None)}) "
            "cannot be read as floating-point matrices. Load the model with its weights in memory, its experts "
            "unquantised, before fusing, or leave them out with `exclude_modules`."
        )
    return tensor.mT if experts.layout.transposed else tensor
