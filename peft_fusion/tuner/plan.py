"""Which FFNs an adapter fuses and to what width, decided and checked before anything in the model changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..ffn import (
    FFN,
    ConfigWidth,
    Selection,
    check_between,
    check_can_leave,
    config_widths,
    features,
    find_ffns,
    places,
    select_ffns,
    target_widths,
    unreadable_projections,
)
from ..fusing.methods import find_method
from ..fusing.methods.svd import rank_for
from ..fusing.recipe import Recipe
from .config import FusionConfig
from .layer import FusionLayer


@dataclass(frozen=True)
class PlannedFFN:
    """An FFN, the width it is to have, and where the model's config states that width."""

    ffn: FFN
    width: int
    config_width: ConfigWidth

    def shapes(self, recipe: Recipe) -> dict[str, tuple[int, ...]]:
        """The tensors of this FFN in an adapter: name within the model -> shape."""
        shapes: dict[str, tuple[int, ...]] = {}
        names, modules = self.ffn.projection_names, self.ffn.base_projections
        for name, module in zip(names, modules, strict=True):
            is_out = name == names[-1]
            in_features, out_features = features(module)
            if find_method(recipe.method).low_rank:
                rank, rows = self.rank(name), out_features
                shapes[f"{name}.weight"], shapes[f"{name}.weight_in"] = (rows, rank), (rank, in_features)
            else:
                rows = out_features if is_out else out_features // self.ffn.width * self.width
                shapes[f"{name}.weight"] = (rows, self.width if is_out else in_features)
            if getattr(module, "bias", None) is not None:
                shapes[f"{name}.bias"] = (rows,)
            if recipe.scale == "ntk" or (recipe.scale == "counts" and is_out):
                shapes[f"{name}.scale"] = (self.width,) if is_out else (rows,)
        return shapes

    def rank(self, name: str) -> int:
        """The rank at which two factors of a projection hold no more numbers than its narrow form."""
        in_features, out_features = features(self.ffn.base_projections[self.ffn.projection_names.index(name)])
        return rank_for(in_features, out_features, self.width / self.ffn.width)


def plan_ffns(
    model: nn.Module, config: FusionConfig, state_dict: Mapping[str, Tensor] | None = None
) -> list[PlannedFFN]:
    """What an adapter does to a model.

    Args:
        model: the model, unchanged.
        config: the adapter's configuration.
        state_dict: the adapter's weights, where they and not the configuration say what is targeted.

    Returns:
        The FFNs to fuse, in the model's order.

    Raises:
        ValueError: if the model has no FFN of a known layout, the configuration does not fit it, or an FFN
            cannot be fused.
    """
    ffns = find_ffns(model)
    if not ffns and (classes := unreadable_projections(model)):
        raise ValueError(
            f"{type(model).__name__} has FFNs, but their projections are of the class {', '.join(classes)}, which "
            "cannot be read. Load the model unquantised, or quantised by bitsandbytes or torchao."
        )
    if not ffns:
        raise ValueError(
            f"{type(model).__name__} has no FFN of a layout that is known. If it has FFNs of its own, describe "
            "how they name their projections with `peft_fusion.ffn.register_layout(FFNLayout(...))`."
        )
    if state_dict is not None:
        widths = _widths_of_state_dict(ffns, state_dict)
    elif config.fused and config.fused_widths is not None:
        widths = _recorded_widths(ffns, config.fused_widths)
    else:
        widths = _configured_widths(ffns, config)
    chosen = [ffn for ffn in ffns if ffn.name in widths]
    for ffn in chosen:
        _check_no_adapter(ffn)
        check_can_leave(ffn, config.base_weights)
    _check_unshared(model, chosen)
    check_between(chosen)
    _check_modules_to_save(model, config)
    kept = (
        {ffn.name: ffn.width for ffn in ffns} if find_method(config.method).low_rank else {}
    )  # merged, they are as wide as ever
    stated = config_widths(model, ffns, {name: kept.get(name, width) for name, width in widths.items()})
    return [PlannedFFN(ffn, widths[ffn.name], stated[ffn.name]) for ffn in chosen]


def _configured_widths(ffns: list[FFN], config: FusionConfig) -> dict[str, int]:
    selection = Selection(
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        modules_to_save=config.modules_to_save,
    )
    chosen = select_ffns(ffns, selection)
    return target_widths(
        chosen, float(config.ratio), config.intermediate_size, config.width_pattern, config.multiple_of
    )


def _recorded_widths(ffns: list[FFN], recorded: Mapping[str, Iterable[int]]) -> dict[str, int]:
    """The widths of a saved adapter, if it was made for a model with these FFNs."""
    found = {ffn.name: ffn.width for ffn in ffns}
    widths = {}
    for name, (full, narrow) in recorded.items():
        if found.get(name) != full:
            has = f"has {found[name]} neurons there" if name in found else f"has no such FFN, but {sorted(found)[:4]}"
            raise ValueError(
                f"The adapter was made for another model: it narrows the FFN {name!r} from {full} to {narrow} "
                f"neurons, but this model {has}. Load it on the model it was made for."
            )
        widths[name] = narrow
    return widths


def _widths_of_state_dict(ffns: list[FFN], state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    """The FFNs that an adapter's weights belong to, and the widths that their shapes state."""
    prefix = "base_model.model."
    weights = {
        key.removeprefix(prefix).split(".mlp_fusion_narrow.")[0]: value
        for key, value in state_dict.items()
        if ".mlp_fusion_narrow." in key and key.endswith(".weight")
    }
    widths = {}
    for ffn in ffns:
        present = [name for name in ffn.projection_names if name in weights]
        if present and len(present) < len(ffn.projection_names):
            missing = sorted(set(ffn.projection_names) - set(present))
            raise ValueError(f"The state dict holds weights for {present}, but none for {missing} of the same FFN.")
        if present:
            widths[ffn.name] = weights[ffn.projection_names[-1]].shape[1]
    if not widths:
        raise ValueError(
            f"The state dict holds narrow weights for none of the model's FFNs; it has {sorted(state_dict)[:3]}."
        )
    return widths


def _check_no_adapter(ffn: FFN) -> None:
    for name, module in zip(ffn.projection_names, ffn.projections, strict=True):
        if isinstance(module, BaseTunerLayer) and not isinstance(module, FusionLayer):
            raise ValueError(
                f"`{name}` already carries an adapter ({type(module).__name__}), which would lose its effect. Merge "
                "that adapter first, or leave this FFN out with `exclude_modules`."
            )


def _check_unshared(model: nn.Module, ffns: Iterable[FFN]) -> None:
    """Refuses a projection that is held in two places: a narrow one would replace it in one of them only."""
    held = places(model)
    for ffn in ffns:
        for module in ffn.projections:
            if len(found := held[id(module)]) > 1:
                raise ValueError(
                    f"The FFN {ffn.name!r} cannot be fused: {' and '.join(f'`{place}`' for place in found)} are one "
                    "and the same module, of which a narrow one could replace only one. Give each place a module of "
                    "its own (`copy.deepcopy`), or leave out every FFN that shares it with `exclude_modules`."
                )


def _check_modules_to_save(model: nn.Module, config: FusionConfig) -> None:
    """Refuses a name that no module ends with; PEFT adds "classifier" and "score" on its own."""
    names = [name for name, _ in model.named_modules()]
    for wanted in config.modules_to_save or ():
        if wanted not in ("classifier", "score") and not any(name.endswith(wanted) for name in names):
            raise ValueError(
                f"`modules_to_save` has {wanted!r}, but no module's name ends with it. The top-level ones are "
                f"{[name for name, _ in model.named_children()]}."
            )
