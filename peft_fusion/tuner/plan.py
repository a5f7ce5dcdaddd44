"""Which FFNs an adapter fuses and to what width, decided and checked before anything in the model changes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..ffn import (
    FFN,
    AnyFFN,
    ConfigWidth,
    Experts,
    Selection,
    check_between,
    check_can_leave,
    config_widths,
    features,
    find_all,
    places,
    select_ffns,
    state_widths,
    target_widths,
    unreadable_projections,
    width_steps,
)
from ..fusing.methods import find_method
from ..fusing.methods.svd import rank_for
from .config import FusionConfig
from .layer import FusionLayer
from .plan_experts import PlannedExperts, check_can_fuse_experts


@dataclass(frozen=True)
class PlannedFFN:
    """An FFN, the width it is to have, and where the model's config states that width."""

    ffn: FFN
    width: int
    config_width: ConfigWidth

    def shapes(
        self, low_rank: bool, scale: str, ranks: Mapping[str, int] | None = None
    ) -> dict[str, dict[str, tuple[int, ...]]]:
        """The tensors of this FFN in an adapter: a projection's name -> "weight", "bias", ... -> shape.

        Args:
            low_rank: whether ranks are lowered, and the width is left.
            scale: the recipe's.
            ranks: a projection's name -> its rank, where it is not the one that the width comes to.
        """
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        names, modules = self.ffn.projection_names, self.ffn.base_projections
        for name, module in zip(names, modules, strict=True):
            shapes: dict[str, tuple[int, ...]]
            is_out = name == names[-1]
            in_features, out_features = features(module)
            if low_rank:
                rank, rows = (ranks or {}).get(name, self.rank(name)), out_features
                shapes = {"weight": (rows, rank), "weight_in": (rank, in_features)}
            else:
                rows = out_features if is_out else out_features // self.ffn.width * self.width
                shapes = {"weight": (rows, self.width if is_out else in_features)}
            if getattr(module, "bias", None) is not None:
                shapes["bias"] = (rows,)
            if not low_rank and (scale == "ntk" or (scale == "counts" and is_out)):
                shapes["scale"] = (self.width,) if is_out else (rows,)
            found[name] = shapes
        return found

    def rank(self, name: str) -> int:
        """The rank at which two factors of a projection hold no more numbers than its narrow form."""
        in_features, out_features = features(self.ffn.base_projections[self.ffn.projection_names.index(name)])
        return rank_for(in_features, out_features, self.width / self.ffn.width)


AnyPlanned = PlannedFFN | PlannedExperts


def plan_ffns(
    model: nn.Module, config: FusionConfig, widths: Mapping[str, int] | None = None, low_rank: bool | None = None
) -> list[AnyPlanned]:
    """What an adapter does to a model.

    Args:
        model: the model, unchanged.
        config: the adapter's configuration.
        widths: FFN name -> narrow width, where the tensors of an adapter and not the configuration say it.
        low_rank: whether they are of low rank and leave the width; None: if the configuration's method does so.

    Returns:
        The FFNs to fuse, in the model's order.

    Raises:
        ValueError: if the model has no FFN of a known layout, the configuration does not fit it, or an FFN
            cannot be fused.
    """
    ffns = find_all(model)
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
    widths = _configured_widths(model, ffns, config) if widths is None else widths
    low_rank = find_method(config.method).low_rank if low_rank is None else low_rank
    chosen = [ffn for ffn in ffns if ffn.name in widths]
    experts = [ffn for ffn in chosen if isinstance(ffn, Experts)]
    dense = [ffn for ffn in chosen if isinstance(ffn, FFN)]
    for ffn in chosen:
        _check_no_adapter(ffn)
        check_can_leave(dict(zip(ffn.projection_names, ffn.base_projections, strict=True)), config.base_weights)
    _check_unshared(model, chosen)
    check_between(dense)
    check_can_fuse_experts(experts, config, low_rank)
    _check_modules_to_save(model, config)
    kept = {ffn.name: ffn.width for ffn in ffns} if low_rank else {}  # merged, they are as wide as ever
    stated = config_widths(model, ffns, {name: kept.get(name, width) for name, width in widths.items()})
    return [planned(ffn, widths[ffn.name], stated[ffn.name]) for ffn in chosen]


def warn_of_unstatable(model: nn.Module, plan: Sequence[AnyPlanned]) -> None:
    """Warns where no checkpoint of the merged model can state its widths, while that is easily changed."""
    doubtful = any(planned.width != planned.ffn.width and not planned.config_width.states_it for planned in plan)
    if not doubtful or not isinstance(model, PreTrainedModel):
        return
    try:
        state_widths(model, {planned.ffn.name: planned.width for planned in plan})
    except ValueError as error:
        warnings.warn(f"Merged, this model could not be exported. {error}", stacklevel=2)


def planned(ffn: AnyFFN, width: int, config_width: ConfigWidth) -> AnyPlanned:
    """What is to be done to an FFN of either kind."""
    if isinstance(ffn, Experts):
        return PlannedExperts(ffn, width, config_width)
    return PlannedFFN(ffn, width, config_width)


def _configured_widths(model: nn.Module, ffns: list[AnyFFN], config: FusionConfig) -> dict[str, int]:
    selection = Selection(
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        modules_to_save=config.modules_to_save,
    )
    chosen = select_ffns(ffns, selection)
    steps = width_steps(model, ffns, config.multiple_of)
    return target_widths(
        chosen, float(config.ratio), config.intermediate_size, config.width_pattern, config.multiple_of, steps
    )


def _check_no_adapter(ffn: AnyFFN) -> None:
    for name, module in zip(ffn.projection_names, ffn.projections, strict=True):
        if isinstance(module, BaseTunerLayer) and not isinstance(module, FusionLayer):
            raise ValueError(
                f"`{name}` already carries an adapter ({type(module).__name__}), which would lose its effect. Merge "
                "that adapter first, or leave this FFN out with `exclude_modules`."
            )


def _check_unshared(model: nn.Module, ffns: Iterable[AnyFFN]) -> None:
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
