"""Makes narrow experts: fused from the original ones, random, or empty to load into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..ffn import experts_tensors, read_experts
from ..fusing.methods import narrow_by
from ..fusing.recipe import Recipe
from ..fusing.weights import NarrowFFN
from .experts import NarrowExperts
from .plan_experts import PlannedExperts
from .stored import SCALES, Shapes


def fused_experts(planned: PlannedExperts, recipe: Recipe) -> NarrowExperts:
    """Narrow experts made from the weights that the model holds, without data; each expert by itself.

    Args:
        planned: what to fuse, and to what width.
        recipe: how.

    Raises:
        ValueError: if weights cannot be read.
    """
    homogeneity = planned.ffn.homogeneity
    narrow = [narrow_by(weights, planned.width, recipe, homogeneity) for weights in read_experts(planned.ffn)]
    return experts_of(narrow, planned, recipe)


def experts_of(narrow: Sequence[NarrowFFN], planned: PlannedExperts, recipe: Recipe) -> NarrowExperts:
    """Narrow weights of every expert as the module that holds them, in the dtype and on the device of the originals.

    Args:
        narrow: one for each expert, all of the planned width.
        planned: what they stand for.
        recipe: how they were made; it says which scales stand alone.
    """
    layout, like = planned.ffn.layout, planned.ffn.like
    weights = [one.folded() if recipe.scale == "none" else one.weights for one in narrow]
    tensors = {name: tensor.to(like) for name, tensor in experts_tensors(weights, layout).items()}
    scale, in_scale = None, None
    if recipe.scale != "none":
        scale = torch.stack([one.scale for one in narrow]).to(like.device, torch.float32)
    if recipe.scale == "ntk":
        ones = torch.ones_like(narrow[0].scale)
        pieces = [one.in_scales or (ones,) * len(one.weights.in_weights) for one in narrow]
        joined = layout.join([torch.stack(piece) for piece in zip(*pieces, strict=True)])
        in_scale = joined.to(like.device, torch.float32)
    return NarrowExperts(tensors, layout, scale, in_scale, planned.ffn.module, planned.width)


def random_experts(planned: PlannedExperts, recipe: Recipe, generator: torch.Generator) -> NarrowExperts:
    """Narrow experts of random weights, drawn by a generator on the CPU, and scales of one."""
    shapes = planned.shapes(False, recipe.scale)[planned.ffn.name]
    return _made_of(planned, shapes, lambda shape: torch.randn(shape, generator=generator, device="cpu") * 0.02, 1.0)


def empty_experts(planned: PlannedExperts, shapes: Shapes) -> NarrowExperts:
    """Narrow experts to load tensors into; NaN, so that tensors that never came cannot go unnoticed.

    Args:
        planned: the experts.
        shapes: a parameter's name, "scale" or "in_scale" -> shape.
    """
    return _made_of(planned, shapes, lambda shape: torch.full(shape, torch.nan), torch.nan)


def _made_of(
    planned: PlannedExperts,
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[tuple[int, ...]], Tensor],
    scales: float,
) -> NarrowExperts:
    """Narrow experts with made-up weights."""
    layout, like = planned.ffn.layout, planned.ffn.like
    tensors = {name: make(shapes[name]).to(like) for name in layout.names}
    scale, in_scale = (
        torch.full(shapes[name], scales, device=like.device) if name in shapes else None
        for name in sorted(SCALES)[::-1]
    )
    return NarrowExperts(tensors, layout, scale, in_scale, planned.ffn.module, planned.width)
