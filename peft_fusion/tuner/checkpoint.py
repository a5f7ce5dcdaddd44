"""Between an adapter's stored tensors and a model: what they say is to be fused, and whether they fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..ffn import AnyFFN, Experts, features, find_all
from ..fusing.methods import find_method
from ..fusing.settle import settle
from .config import FusionConfig
from .plan import AnyPlanned, plan_ffns
from .recipe import asked_recipe, recorded_recipe
from .stored import SCALES, Shapes, StoredTensors

Plan = list[tuple[AnyPlanned, dict[str, Shapes]]]
"""What to fuse, each with its projections' names -> "weight", "bias", ... -> shape."""


def plan_stored(model: nn.Module, config: FusionConfig, stored: StoredTensors) -> Plan:
    """What an adapter whose tensors are known does to a model: they decide, whatever the configuration says.

    Args:
        model: the model, unchanged.
        config: the adapter's configuration; what it records of the FFNs is checked.
        stored: the adapter's tensors.

    Returns:
        What to fuse.

    Raises:
        ValueError: if a tensor is missing, has another shape than the model needs, or has no place in the model.
    """
    narrow = stored.narrow()
    low_rank = any("weight_in" in kinds for kinds in narrow.values())
    widths = _recorded_widths(model, config)
    if widths is None:
        held = [ffn for ffn in find_all(model) if not narrow.keys().isdisjoint(ffn.projection_names)]
        widths = {ffn.name: _width(ffn, narrow, low_rank) for ffn in held}
    if not narrow or not widths:
        raise ValueError(
            f"{stored.origin} holds narrow weights for none of the model's FFNs; it has {sorted(stored.shapes)[:3]}."
        )
    plan = [(p, _needed(p, narrow, low_rank)) for p in plan_ffns(model, config, widths, low_rank)]
    stored.check_narrow({name: kinds for _, needed in plan for name, kinds in needed.items()})
    stored.check(shapes_to_save(model, config), stored.mismatched_modules)
    return plan


def plan_announced(model: nn.Module, config: FusionConfig) -> Plan:
    """What an adapter does to a model whose tensors come later (`low_cpu_mem_usage`), as far as its record tells.

    Raises:
        ValueError: if the configuration does not fit the model.
    """
    recipe = recorded_recipe(config) if config.fused else None
    recipe = recipe or settle(asked_recipe(config))
    plan = plan_ffns(model, config, _recorded_widths(model, config))
    return [(planned, planned.shapes(find_method(recipe.method).low_rank, recipe.scale)) for planned in plan]


def shapes_to_save(model: nn.Module, config: FusionConfig) -> Shapes:
    """The tensors of the modules that an adapter trains in full: their names within the model -> shape."""
    wanted = tuple(config.modules_to_save or ())
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if name.endswith(wanted) and not any(name.startswith(f"{above}.") for above in found):
            found[name] = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
    return {
        f"{name}.{key}": tuple(value.shape)
        for name, module in found.items()
        for key, value in module.state_dict().items()
        if isinstance(value, Tensor)
    }


def record(config: FusionConfig, plan: Plan) -> None:
    """Writes into a configuration what an adapter is that was loaded; what only its maker knew is left as it was."""
    kinds = [(name == p.ffn.projection_names[-1], k) for p, needed in plan for name, k in needed.items()]
    scaled = {is_out for is_out, k in kinds if "scale" in k} | {False for _, k in kinds if "in_scale" in k}
    recipe = recorded_recipe(config) if config.fused else None
    recipe = replace(recipe or asked_recipe(config), scale=scale_name(scaled))
    if any("weight_in" in k for _, k in kinds):
        recipe = replace(recipe, method="svd")
    config.fused_by = recipe.to_dict()
    config.fused_widths = {p.ffn.name: [p.ffn.width, p.width] for p, _ in plan}


def scale_name(scaled: Collection[bool]) -> str:
    """What a recipe calls the scales of an adapter: for each projection with one, whether it is an out-projection."""
    return "ntk" if False in scaled else "counts" if scaled else "none"


def _recorded_widths(model: nn.Module, config: FusionConfig) -> dict[str, int] | None:
    """The widths of a saved adapter by its configuration, if the model has the FFNs it was made for."""
    if not config.fused or config.fused_widths is None:
        return None
    found = {ffn.name: ffn.width for ffn in find_all(model)}
    for name, (full, narrow) in config.fused_widths.items():
        if found.get(name) != full:
            has = f"has {found[name]} neurons there" if name in found else f"has no such FFN, but {sorted(found)[:4]}"
            raise ValueError(
                f"The adapter was made for another model: it narrows the FFN {name!r} from {full} to {narrow} "
                f"neurons, but this model {has}. Load it on the model it was made for."
            )
    return {name: narrow for name, (_, narrow) in config.fused_widths.items()}


def _width(ffn: AnyFFN, narrow: Mapping[str, Shapes], low_rank: bool) -> int:
    """The width that the shapes of an FFN's narrow tensors state; where they contradict each other, that of one."""
    if isinstance(ffn, Experts):
        shape = narrow[ffn.name].get(ffn.layout.names[1], ())
        width = shape[1 if ffn.layout.transposed else 2] if len(shape) == 3 else ffn.width
        return max(1, min(width, ffn.width))
    for name, module in zip(reversed(ffn.projection_names), reversed(ffn.base_projections), strict=True):
        shape = narrow.get(name, {}).get("weight", ())
        if len(shape) != 2:
            continue
        in_features, out_features = features(module)
        if low_rank:  # the least that comes to this rank
            width = -(-ffn.width * shape[1] * (in_features + out_features) // (in_features * out_features))
        else:
            width = shape[1] if name == ffn.projection_names[-1] else shape[0] * ffn.width // out_features
        return max(1, min(width, ffn.width))
    return ffn.width


def _needed(planned: AnyPlanned, narrow: Mapping[str, Shapes], low_rank: bool) -> dict[str, Shapes]:
    """The shapes that the stored tensors of an FFN must have; a scale is needed where there is one."""
    ranks = {name: kinds["weight_in"][0] for name, kinds in narrow.items() if kinds.get("weight_in")}
    needed = planned.shapes(low_rank, "ntk", ranks)
    for name, kinds in needed.items():
        for kind in SCALES & (kinds.keys() - narrow.get(name, {}).keys()):
            kinds.pop(kind)
    return needed
