"""Makes the narrow projections of planned FFNs: fused from the original weights, random, or empty to load into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..ffn import (
    OneFFN,
    blank_like,
    by_projection,
    check_finite,
    check_finite_experts,
    networks_of,
    projection_tensors,
    read_experts,
    read_ffn,
    read_one,
)
from ..fusing.methods import find_method, narrow_by
from ..fusing.methods.svd import rank_factors
from ..fusing.recipe import Recipe
from ..fusing.rows import balance
from ..fusing.weights import FFNWeights, NarrowFFN
from ..progress import progress
from .build_experts import empty_experts, experts_of, fused_experts, random_experts
from .narrow import LowRankProjection, Narrow, NarrowInProjection, NarrowOutProjection, NarrowProjection
from .plan import AnyPlanned, PlannedFFN
from .plan_experts import PlannedExperts
from .stored import Shapes


def fused_projections(plan: Sequence[AnyPlanned], recipe: Recipe) -> list[list[Narrow]]:
    """The narrow projections of every planned FFN, made from the weights that the model holds, without data.

    Args:
        plan: what to fuse, and to what width.
        recipe: how.

    Returns:
        For each planned FFN its projections, the out-projection last; of experts the one module of all.

    Raises:
        ValueError: if weights cannot be read, or hold NaN or infinite values.
    """
    for planned in plan:
        check_readable(planned)
    return [narrow_projections(planned, recipe) for planned in progress(plan, "Fusing FFNs")]


def check_readable(planned: AnyPlanned) -> None:
    """Refuses weights that cannot be read, or hold NaN or infinite values.

    Raises:
        ValueError: naming them.
    """
    if isinstance(planned, PlannedExperts):
        check_finite_experts(read_experts(planned.ffn), planned.ffn)
    else:
        check_finite(read_ffn(planned.ffn), planned.ffn)


def narrow_projections(planned: AnyPlanned, recipe: Recipe) -> list[Narrow]:
    """The narrow projections of one planned FFN, out-projection last, made of its weights; see `fused_projections`."""
    if isinstance(planned, PlannedExperts):
        return [fused_experts(planned, recipe)]
    weights = read_ffn(planned.ffn)  # one at a time: what is quantised or partitioned is whole while it is read
    if find_method(recipe.method).low_rank:
        return [*_low_rank(weights, planned)]
    narrow = narrow_by(weights, planned.width, recipe, planned.ffn.homogeneity)
    return [*projections_of(narrow, planned, recipe)]


def calibrated_projections(narrow: Mapping[str, NarrowFFN], planned: AnyPlanned, recipe: Recipe) -> Sequence[Narrow]:
    """The narrow projections of a planned FFN that a calibration has made.

    Args:
        narrow: name of a dense FFN or of an expert -> its narrow one.
        planned: the FFN, or the experts of a layer.
        recipe: what they were made by.
    """
    if isinstance(planned, PlannedExperts):
        return [experts_of([narrow[one.name] for one in networks_of(planned.ffn)], planned, recipe)]
    return projections_of(narrow[planned.ffn.name], planned, recipe, copy=planned.width == planned.ffn.width)


def whole(ffn: OneFFN) -> NarrowFFN:
    """An FFN that keeps its width, as a narrow one: views of its weights, and a scale of ones."""
    weights = read_one(ffn)
    return NarrowFFN(weights, torch.ones(weights.width, device=weights.out_weight.device))


def random_projections(planned: AnyPlanned, recipe: Recipe, generator: torch.Generator) -> Sequence[Narrow]:
    """Narrow projections of random weights, drawn by a generator on the CPU, and scales of one."""
    if isinstance(planned, PlannedExperts):
        return [random_experts(planned, recipe, generator)]
    shapes = planned.shapes(find_method(recipe.method).low_rank, recipe.scale)
    return _made_of(planned, shapes, lambda shape: torch.randn(shape, generator=generator, device="cpu") * 0.02, 1.0)


def empty_projections(planned: AnyPlanned, shapes: Mapping[str, Shapes]) -> Sequence[Narrow]:
    """Narrow projections to load tensors into; NaN, so that tensors that never came cannot go unnoticed.

    Args:
        planned: the FFN.
        shapes: a projection's name -> "weight", "bias", ... -> shape.
    """
    if isinstance(planned, PlannedExperts):
        return [empty_experts(planned, shapes[planned.ffn.name])]
    return _made_of(planned, shapes, lambda shape: torch.full(shape, torch.nan), torch.nan)


def projections_of(
    narrow: NarrowFFN, planned: PlannedFFN, recipe: Recipe, *, copy: bool = True
) -> list[NarrowProjection]:
    """Narrow weights as the modules that hold them, each in the dtype and on the device of its original.

    Without `copy` they hold matrices that suit them as they are: those may be no views of the original's.
    """
    weights = narrow.folded() if recipe.scale == "none" else narrow.weights
    tensors = projection_tensors(weights, planned.ffn)
    scales = _scales(narrow, planned, recipe)
    made: list[NarrowProjection] = []
    for (weight, bias), scale, module in zip(tensors, scales, planned.ffn.base_projections, strict=True):
        like = blank_like(module)
        kind = NarrowOutProjection if len(made) == len(tensors) - 1 else NarrowInProjection
        own_bias = None if bias is None else bias.to(like, copy=True)
        own_scale = None if scale is None else scale.to(like.device, torch.float32)
        made.append(kind(weight.to(like, copy=copy).contiguous(), own_bias, own_scale))
    return made


def _scales(narrow: NarrowFFN, planned: PlannedFFN, recipe: Recipe) -> list[Tensor | None]:
    """The scale that each projection applies, the out-projection's last."""
    if recipe.scale == "none":
        return [None] * len(planned.ffn.projections)
    ins: list[Tensor | None] = [None] * len(narrow.weights.in_weights)
    if recipe.scale == "ntk":
        ones = torch.ones_like(narrow.scale)
        ins = list(narrow.in_scales or [ones] * len(ins))
    return [*by_projection(ins, planned.ffn), narrow.scale]


def _low_rank(weights: FFNWeights, planned: PlannedFFN) -> list[NarrowProjection]:
    """Every projection as the product of two thin matrices, at full width."""
    tensors = projection_tensors(balance(weights, planned.ffn.homogeneity), planned.ffn)
    made: list[NarrowProjection] = []
    for (weight, bias), module, name in zip(
        tensors, planned.ffn.base_projections, planned.ffn.projection_names, strict=True
    ):
        left, right = rank_factors(weight, planned.rank(name))
        like = blank_like(module)
        own_bias = None if bias is None else bias.to(like, copy=True)
        made.append(LowRankProjection(left.to(like).contiguous(), right.to(like).contiguous(), own_bias))
    return made


def _made_of(
    planned: PlannedFFN, shapes: Mapping[str, Shapes], make: Callable[[tuple[int, ...]], Tensor], scales: float
) -> list[NarrowProjection]:
    """The projections of a planned FFN with made-up weights."""
    projections: list[NarrowProjection] = []
    for name, module in zip(planned.ffn.projection_names, planned.ffn.base_projections, strict=True):
        like, sizes = blank_like(module), shapes[name]
        own = {kind: make(size).to(like.device, like.dtype) for kind, size in sizes.items() if kind != "scale"}
        scale = torch.full(sizes["scale"], scales, device=like.device) if "scale" in sizes else None
        if "weight_in" in sizes:
            projections.append(LowRankProjection(own["weight"], own["weight_in"], own.get("bias")))
        else:
            kind = NarrowOutProjection if name == planned.ffn.projection_names[-1] else NarrowInProjection
            projections.append(kind(own["weight"], own.get("bias"), scale))
    return projections
