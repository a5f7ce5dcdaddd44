"""Every FFN of a model, of whichever kind."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..fusing.weights import FFNWeights
from .experts import Experts, find_experts
from .experts_weights import read_experts
from .find import FFN, find_ffns
from .linear import read_ffn

AnyFFN = FFN | Experts


def find_all(model: nn.Module) -> list[AnyFFN]:
    """Every FFN of a model that can be found, dense ones and routed experts, in the order of its modules.

    Args:
        model: any model, with or without adapters.

    Returns:
        The FFNs; the experts of one layer are one of them.
    """
    ffns: list[AnyFFN] = [*find_ffns(model), *find_experts(model)]
    found = {ffn.name: ffn for ffn in ffns}
    return [found[name] for name, _ in model.named_modules() if name in found]


def list_ffns(model: nn.Module) -> list[dict[str, Any]]:
    """The FFNs of any model, on the meta device or not: "name", "layout", "width" and "parameters" of each."""
    return [
        {"name": ffn.name, "layout": str(ffn.layout), "width": ffn.width, "parameters": parameters_of(ffn)}
        for ffn in find_all(model)
    ]


def read_all(ffn: AnyFFN) -> list[FFNWeights]:
    """The weights of an FFN, or of every expert; see `read_ffn` and `read_experts`."""
    return read_experts(ffn) if isinstance(ffn, Experts) else [read_ffn(ffn)]


def parameters_of(ffn: AnyFFN, width: int | None = None) -> int:
    """How many parameters an FFN, or all of its experts together, have at a width; None: at the original one."""
    width = ffn.width if width is None else width
    if isinstance(ffn, Experts):
        shapes = ffn.layout.shapes(ffn.count, ffn.in_dim, width, ffn.out_dim)
        return sum(math.prod(shape) for shape in shapes.values())
    bias = getattr(ffn.base_projections[-1], "bias", None)
    return ffn.neuron_parameters * width + (0 if bias is None else ffn.out_dim)
