"""Makes MLP Fusion known to PEFT. The only file that touches PEFT's internals."""

from __future__ import annotations

from functools import wraps
from typing import Any

from peft import PeftConfig, PeftType
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

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
    _remember_where_configs_come_from()


def _remember_where_configs_come_from() -> None:
    """Notes on every loaded `FusionConfig` the folder it was read from.

    Every way of loading an adapter (PEFT's and transformers') reads its configuration first, then changes the
    model, and only then opens the weights. With the folder at hand the tuner checks the weights' file before
    anything is changed.
    """
    original = PeftConfigMixin.from_pretrained.__func__

    @wraps(original)
    def from_pretrained(
        cls: type[PeftConfig], pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        config = original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if config.peft_type == PeftType[NAME]:
            config._loaded_from = (pretrained_model_name_or_path, subfolder)
        return config

    PeftConfigMixin.from_pretrained = classmethod(from_pretrained)
