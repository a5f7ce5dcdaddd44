"""What comes of a configuration on a model: every narrow projection, made before the first module is replaced.

Either from what is stored (`to_load`), which clusters nothing, or anew (`made_anew`): as a calibration has left them,
random, or fused from the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..fusing.settle import settle
from .build import calibrated_projections, empty_projections, fused_projections, random_projections
from .checkpoint import plan_announced, plan_stored, record
from .config import FusionConfig
from .handover import allocated_widths, calibrated_for
from .narrow import Narrow
from .plan import AnyPlanned, plan_ffns, warn_of_unstatable
from .recipe import asked_recipe
from .stored import StoredTensors

Made = list[tuple[AnyPlanned, Sequence[Narrow]]]
"""What was planned, each with its narrow projections, the out-projection last; of experts the one module of all."""


def to_load(model: nn.Module, config: FusionConfig, stored: StoredTensors | None) -> Made:
    """Empty projections for tensors that are stored or, without any at hand, announced by the configuration.

    Raises:
        ValueError: if the tensors or the configuration do not fit the model.
    """
    expected = plan_announced(model, config) if stored is None else plan_stored(model, config, stored)
    made: Made = [(planned, empty_projections(planned, shapes)) for planned, shapes in expected]
    record(config, expected)
    return made


def made_anew(model: nn.Module, config: FusionConfig) -> Made:
    """The narrow projections of every FFN that the configuration wants narrow; it is told their widths and recipe.

    Raises:
        ValueError: if the configuration does not fit the model, or its weights cannot be fused.
    """
    plan = plan_ffns(model, config)
    if config.allocation == "fisher":
        plan = plan_ffns(model, config, allocated_widths(model, plan))
    warn_of_unstatable(model, plan)
    asked = asked_recipe(config)
    calibrated = calibrated_for(model, plan, asked) if config.init_weights else None
    recipe = settle(asked) if calibrated is None else calibrated.recipe
    ffns: list[Sequence[Narrow]]
    if not config.init_weights:
        generator = torch.Generator().manual_seed(config.seed)
        ffns = [random_projections(planned, recipe, generator) for planned in plan]
    elif calibrated:
        ffns = [calibrated_projections(calibrated.narrow, planned, recipe) for planned in plan]
    else:
        ffns = [*fused_projections(plan, recipe)]
    config.fused_widths = {planned.ffn.name: [planned.ffn.width, planned.width] for planned in plan}
    config.fused_by = recipe.to_dict()
    return [*zip(plan, ffns, strict=True)]
