"""Makes MLP Fusion known to PEFT. The only file that touches PEFT's internals."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

from peft import PeftConfig, PeftMixedModel, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_MIXED_MODEL_MAPPING
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, _maybe_include_all_linear_layers
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

Method = Callable[..., Any]

NAME = "MLP_FUSION"


def add_peft_type() -> None:
    """Adds the member `MLP_FUSION` to PEFT's closed enumeration of methods; does nothing the second time."""
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    setattr(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    hashable = getattr(PeftType, "_hashable_values_", None)  # Python 3.13 on
    if hashable is not None:
        hashable.append(NAME)


def register() -> None:
    """Registers configuration and tuner under the prefix `mlp_fusion_`; does nothing the second time."""
    from peft.utils import register_peft_method

    from .config import FusionConfig
    from .model import FusionModel

    if PeftType[NAME] in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    register_peft_method(name=NAME.lower(), config_cls=FusionConfig, model_cls=FusionModel)
    _register_for_mixed_models()
    _tell_when_adapters_are_loaded()
    _keep_other_tuners_off_fused_ffns()


def forget_refused_adapter(model: nn.Module) -> None:
    """Takes back transformers' note that a model has adapters, if the first one was refused.

    `add_adapter` and `load_adapter` set it before they try, and would then fail on the corrected second try.
    """
    if not getattr(model, "peft_config", None):
        vars(model).pop("_hf_peft_config_loaded", None)  # the class says that there are none


def _register_for_mixed_models() -> None:
    """Lets `get_peft_model(..., mixed=True)` and `PeftMixedModel` take fusion adapters beside LoRA's."""
    import peft.mixed_model
    import peft.tuners.mixed
    import peft.tuners.mixed.model as constants

    from .layer import FusionLayer
    from .mixed import MixedFusionModel
    from .model import FusionModel

    types = (*constants.COMPATIBLE_TUNER_TYPES, PeftType[NAME])
    constants.COMPATIBLE_TUNER_TYPES = peft.tuners.mixed.COMPATIBLE_TUNER_TYPES = types
    constants.PREFIXES.append(FusionModel.prefix)
    constants.Layers = (*constants.Layers, FusionLayer)
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING[PeftType[NAME]] = MixedFusionModel
    peft.mixed_model.MixedModel = MixedFusionModel


def _tell_when_adapters_are_loaded() -> None:
    """Has the tuner know that the tensors of an adapter follow, before anything in the model changes for it."""
    from .loading import while_peft_loads, while_transformers_loads

    for model in (PeftModel, PeftMixedModel):
        from_pretrained = vars(model)["from_pretrained"].__func__
        model.from_pretrained = classmethod(_inside(while_peft_loads, from_pretrained))
    PeftModel.load_adapter = _inside(while_peft_loads, PeftModel.load_adapter)  # the mixed model's calls it
    PeftAdapterMixin.load_adapter = _inside(while_transformers_loads, PeftAdapterMixin.load_adapter)


def _inside(context: Callable[[dict[str, Any]], AbstractContextManager[None]], method: Method) -> Method:
    """A method that does what it did, inside a context that gets its arguments by name."""
    signature = inspect.signature(method)

    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return method(*args, **kwargs)  # says what is wrong
        bound.apply_defaults()
        given = dict(bound.arguments)
        given.update(given.pop("kwargs", {}))
        with context(given):
            return method(*args, **kwargs)

    return wrapped


def _keep_other_tuners_off_fused_ffns() -> None:
    """Has every tuner of PEFT refuse two mistakes before it changes anything.

    It would take over the name of a fusion adapter, whose configuration is lost then, and it would size itself
    for the original width of a fused projection, which fails in the first forward pass.
    """
    init, inject = BaseTuner.__init__, BaseTuner.inject_adapter

    @wraps(init)
    def checked_init(
        self: BaseTuner, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        existing = getattr(model, "peft_config", None) or {}
        before = dict(existing)
        new = peft_config if isinstance(peft_config, PeftConfig) else peft_config[adapter_name]
        if adapter_name in before and PeftType[NAME] in (new.peft_type, before[adapter_name].peft_type):
            raise ValueError(
                f"The model already has an adapter named {adapter_name!r}. Give this one another `adapter_name`."
            )
        try:
            init(self, model, peft_config, adapter_name, *args, **kwargs)
        except Exception:
            if adapter_name not in before:  # the tuners of one model share this dictionary
                existing.pop(adapter_name, None)
            raise

    @wraps(inject)
    def checked_inject(self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        if config.peft_type != PeftType[NAME] and kwargs.get("state_dict") is None:
            _check_targets(self, model, config)
        inject(self, model, adapter_name, *args, **kwargs)

    BaseTuner.__init__, BaseTuner.inject_adapter = checked_init, checked_inject


def _check_targets(tuner: BaseTuner, model: nn.Module, config: PeftConfig) -> None:
    """Refuses another method's configuration that targets projections of fused FFNs.

    Raises:
        ValueError: naming them.
    """
    from .layer import FusionLayer

    fused = [name for name, module in model.named_modules() if isinstance(module, FusionLayer)]
    if not fused or not hasattr(config, "target_modules"):
        return
    config = tuner._prepare_adapter_config(copy.copy(config), BaseTuner.get_model_config(model))
    config = _maybe_include_all_linear_layers(config, model)
    matches = {name: tuner._check_target_module_exists(config, name) for name in fused}
    hit = [name for name, match in matches.items() if match and not isinstance(match, _ExcludedModule)]
    if hit:
        shown = ", ".join(hit[:3]) + (f" and {len(hit) - 3} more" if len(hit) > 3 else "")
        raise ValueError(
            f"`target_modules` of the {config.peft_type.value} adapter names projections of fused FFNs: {shown}. It "
            "would be sized for their original width. Leave them out (`target_modules` of the attention alone, or "
            '"all-linear", which does so), or call `peft_fusion.fuse(model, config)` first: that gives a plain '
            "narrow model, to which any method applies, its FFNs included."
        )
