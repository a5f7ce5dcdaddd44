"""Makes MLP Fusion known to PEFT. The only file that touches PEFT's internals; it knows the classes as arguments."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import peft.tuners.mixed
import peft.tuners.mixed.model
from peft import PeftConfig, PeftMixedModel, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_MIXED_MODEL_MAPPING
from peft.mapping_func import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, _maybe_include_all_linear_layers
from peft.utils import register_peft_method
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin

NAME = "MLP_FUSION"

Method = Callable[..., Any]
Around = Callable[[dict[str, Any]], AbstractContextManager[None]]
"""A context around a call, which gets the call's arguments by name."""


def register(
    config: type[PeftConfig],
    tuner: type[BaseTuner],
    mixed_tuner: type[MixedModel],
    layer: type[nn.Module],
    while_peft_loads: Around,
    while_transformers_loads: Around,
    while_added: Around,
) -> None:
    """Registers MLP Fusion under the prefix of its tuner; does nothing the second time.

    Args:
        config: the configuration's class.
        tuner: the tuner's.
        mixed_tuner: the class that PEFT's tuner for adapters of several types becomes with a fusion adapter.
        layer: the class of the layers that a fused model has.
        while_peft_loads: entered around every call that loads an adapter, of whatever type, by PEFT's methods.
        while_transformers_loads: the same, by transformers' method.
        while_added: entered around every call that makes an adapter, of whatever type, by either's methods.
    """
    _add_peft_type()
    if PeftType[NAME] in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    register_peft_method(name=NAME.lower(), config_cls=config, model_cls=tuner)
    _register_for_mixed_models(tuner, mixed_tuner, layer)
    _enter_around_loading(while_peft_loads, while_transformers_loads)
    _enter_around_adding(while_added)
    _keep_other_tuners_off_fused_ffns(layer)


def _add_peft_type() -> None:
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


def _register_for_mixed_models(tuner: type[BaseTuner], mixed_tuner: type[MixedModel], layer: type[nn.Module]) -> None:
    """Lets `get_peft_model(..., mixed=True)` and `PeftMixedModel` take fusion adapters beside LoRA's."""
    constants = peft.tuners.mixed.model
    types = (*constants.COMPATIBLE_TUNER_TYPES, PeftType[NAME])
    constants.COMPATIBLE_TUNER_TYPES = peft.tuners.mixed.COMPATIBLE_TUNER_TYPES = types
    constants.PREFIXES.append(tuner.prefix)
    constants.Layers = (*constants.Layers, layer)
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING[PeftType[NAME]] = mixed_tuner

    @wraps(BaseTuner.inject_adapter)
    def inject_adapter(self: MixedModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if type(self) is not MixedModel or self.peft_config[adapter_name].peft_type != PeftType[NAME]:
            return super(MixedModel, self).inject_adapter(model, adapter_name, *args, **kwargs)
        self.__class__ = mixed_tuner  # from the first fusion adapter on; without one it stays PEFT's own
        try:
            return self.inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            self.__class__ = MixedModel
            raise

    MixedModel.inject_adapter = inject_adapter


def _enter_around_loading(while_peft_loads: Around, while_transformers_loads: Around) -> None:
    """Has the tuner know that the tensors of an adapter follow, before anything in the model changes for it."""
    for model in (PeftModel, PeftMixedModel):
        from_pretrained = vars(model)["from_pretrained"].__func__
        model.from_pretrained = classmethod(_inside(while_peft_loads, from_pretrained))
    PeftModel.load_adapter = _inside(while_peft_loads, PeftModel.load_adapter)  # the mixed model's calls it
    PeftAdapterMixin.load_adapter = _inside(while_transformers_loads, PeftAdapterMixin.load_adapter)


def _enter_around_adding(while_added: Around) -> None:
    """Has what PEFT does to a model once the tuner is done, such as copying its head, end well or not at all."""
    for model in {PeftModel, PeftMixedModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()}:
        for name in {"__init__", "add_adapter"} & vars(model).keys():
            setattr(model, name, _inside(while_added, vars(model)[name]))
    PeftAdapterMixin.add_adapter = _inside(while_added, PeftAdapterMixin.add_adapter)


def _inside(context: Around, method: Method) -> Method:
    """A method that does what it did, inside a context."""
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


def _keep_other_tuners_off_fused_ffns(layer: type[nn.Module]) -> None:
    """Has every tuner of PEFT refuse two mistakes in a model that holds a fusion adapter, and only there.

    It would take over the name of that adapter, whose configuration is lost then, and it would size itself for the
    original width of a fused projection, which fails in the first forward pass.
    """
    init, inject = BaseTuner.__init__, BaseTuner.inject_adapter

    @wraps(init)
    def checked_init(
        self: BaseTuner, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        held = getattr(model, "peft_config", None)
        if not isinstance(held, dict) or not any(_is_fusion(config) for config in held.values()):
            return init(self, model, peft_config, adapter_name, *args, **kwargs)
        if _is_fusion(held.get(adapter_name)):
            raise ValueError(
                f"The model already has an adapter named {adapter_name!r}. Give this one another `adapter_name`."
            )
        before = dict(held)
        try:
            return init(self, model, peft_config, adapter_name, *args, **kwargs)
        except BaseException:
            held.clear()  # the tuners of one model share this dictionary
            held.update(before)
            raise

    @wraps(inject)
    def checked_inject(self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        fused = [name for name, module in model.named_modules() if isinstance(module, layer)]
        config = self.peft_config[adapter_name] if fused else None
        if config is not None and not _is_fusion(config):
            _check_targets(self, model, config, fused, kwargs.get("state_dict"))
        return inject(self, model, adapter_name, *args, **kwargs)

    BaseTuner.__init__, BaseTuner.inject_adapter = checked_init, checked_inject


def _is_fusion(config: Any) -> bool:
    return isinstance(config, PeftConfig) and config.peft_type == PeftType[NAME]


def _check_targets(
    tuner: BaseTuner,
    model: nn.Module,
    config: PeftConfig,
    fused: Iterable[str],
    state_dict: Mapping[str, Tensor] | None,
) -> None:
    """Refuses another method's configuration, or state dict, that targets projections of fused FFNs.

    Raises:
        ValueError: naming them.
    """
    if state_dict is not None:
        named = {key.rsplit(f".{tuner.prefix}", 1)[0].removeprefix("_orig_mod.") for key in state_dict}
        hit = [name for name in fused if name in named]
    elif not hasattr(config, "target_modules"):
        return
    else:
        config = tuner._prepare_adapter_config(copy.copy(config), BaseTuner.get_model_config(model))
        config = _maybe_include_all_linear_layers(config, model)
        matches = {name: tuner._check_target_module_exists(config, name) for name in fused}
        hit = [name for name, match in matches.items() if match and not isinstance(match, _ExcludedModule)]
        hit += _parameters_hit(model, config, fused)
    if hit:
        shown = ", ".join(hit[:3]) + (f" and {len(hit) - 3} more" if len(hit) > 3 else "")
        raise ValueError(
            f"`target_modules` or `target_parameters` of the {config.peft_type.value} adapter names projections of "
            f"fused FFNs: {shown}. It would be sized for their original width. Leave them out (`target_modules` of the "
            'attention alone, or "all-linear", which does so), or call `peft_fusion.fuse(model, config)` first: that '
            "gives a plain narrow model, to which any method applies, its FFNs included."
        )


def _parameters_hit(model: nn.Module, config: PeftConfig, fused: Iterable[str]) -> list[str]:
    """The original parameters below fused modules that a configuration names, beneath the adapter or as if without."""
    targets = tuple(f".{target}" for target in getattr(config, "target_parameters", None) or ())
    found = []
    for name in fused if targets else ():
        base: nn.Module = model.get_submodule(name).get_base_layer()  # type: ignore[operator]
        for parameter, _ in base.named_parameters(recurse=False):
            if f".{name}.{parameter}".endswith(targets) or f".{name}.base_layer.{parameter}".endswith(targets):
                found.append(f"{name}.{parameter}")
    return found
