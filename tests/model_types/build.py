"""Any model type of transformers as a model of some ten thousand weights, with inputs for it."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .sizes import HIDDEN, IMAGE, INPUTS, OVERRIDES, SIZES

# Which of its classes stands for a type: the first of these that it has.
MAPPINGS = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
    "MODEL_FOR_MASKED_LM",
    "MODEL_FOR_CAUSAL_LM",
    "MODEL",
)
LARGEST = 8_000_000


@cache
def classes() -> dict[str, str]:
    """Every model type that has a model class -> the name of the class that stands for it here."""
    first = [f"{name}_MAPPING_NAMES" for name in MAPPINGS]
    names = first + [n for n in dir(modeling_auto) if n.startswith("MODEL_") and n.endswith("_MAPPING_NAMES")]
    found: dict[str, str] = {}
    for name in names:
        for model_type, cls in getattr(modeling_auto, name).items():
            found.setdefault(model_type, cls if isinstance(cls, str) else cls[0])
    return dict(sorted(found.items()))


def tiny_config(config_class: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A config with every size that is known by its name made small, those within it, too."""
    own = OVERRIDES.get(getattr(config_class, "model_type", ""), {}) | changes
    default = config_class()
    inner = {name: getattr(default, name, None) for name in getattr(default, "sub_configs", ())}
    given = {name: small for name, old in vars(default).items() if (small := _small(name, old)) is not None}
    for name, config in inner.items():
        if isinstance(config, PreTrainedConfig) and not isinstance(own.get(name), PreTrainedConfig):
            given[name] = tiny_config(type(config), **own.get(name, {}))
    given |= {name: value for name, value in own.items() if name not in given or name not in inner}
    return config_class(**given)


def _small(name: str, old: Any) -> Any:
    """A smaller value of a config's attribute, of the same form; None: as it is."""
    if name == "rope_parameters" and isinstance(old, dict) and "mrope_section" in old:
        return {**old, "mrope_section": [2, 1, 1][: len(old["mrope_section"])]}
    value = SIZES.get(name)
    if value is None or isinstance(old, dict) or (isinstance(value, list) and not isinstance(old, (list, tuple))):
        return None
    return [value] * len(old) if isinstance(old, (list, tuple)) and not isinstance(value, list) else value


def tiny(model_type: str, seed: int = 0) -> nn.Module:
    """A model of a type, in eval mode; the same seed gives the same weights.

    Raises:
        ValueError: if it is not small.
    """
    if (size := _size(model_type)) > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(seed)
    model = getattr(tf, classes()[model_type])(tiny_config(CONFIG_MAPPING[model_type])).eval()
    with torch.no_grad():  # biases start at zero, which would hide mistakes with them
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.add_(0.02 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0  # as it is when it is loaded
    return model


@cache
def _size(model_type: str) -> int:
    """How many parameters the model has."""
    with torch.device("meta"):
        built = getattr(tf, classes()[model_type])(tiny_config(CONFIG_MAPPING[model_type]))
    return sum(parameter.numel() for parameter in built.parameters())


def batch(model: Any) -> dict[str, Tensor]:
    """Inputs of two examples: what a model cannot do without, or what is said of its type."""
    arguments = inspect.signature(model.forward).parameters
    needed = [
        p.name for p in arguments.values() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    asked = INPUTS.get(model.config.model_type, {})
    names = asked if asked else needed or [_main(model, arguments)]
    if not asked and "decoder_input_ids" in arguments and model.config.is_encoder_decoder:
        names = [*names, "decoder_input_ids"]
    generator = torch.Generator().manual_seed(0)
    return {name: _input(name, asked.get(name), set(names), model.config, generator) for name in dict.fromkeys(names)}


def _main(model: Any, arguments: Any) -> str:
    name = model.main_input_name
    return name if name in arguments and (name in SHAPES or "input_ids" not in arguments) else "input_ids"


SHAPES = {
    "pixel_values": (2, 3, IMAGE, IMAGE),
    "input_values": (2, 400),
    "input_features": (2, 16, 128),
    "hidden_states": (2, 7, HIDDEN),
}


def _input(name: str, shape: Any, names: set[str], config: Any, generator: torch.Generator) -> Tensor:
    """One input: of a shape, or what its name means."""
    if isinstance(shape, Tensor):
        return shape
    if shape is None and "grid_thw" in names and name in ("hidden_states", "pixel_values"):  # flattened patches
        side = config.patch_size**2 * getattr(config, "temporal_patch_size", 1)
        shape = (16, getattr(config, "in_channels", getattr(config, "num_channels", 3)) * side)
    if name.endswith("grid_thw"):
        return torch.tensor([[1, 4, 4]])
    if shape is None and name not in SHAPES:
        return torch.randint(3, 80, (2, 7), generator=generator)
    return torch.randn(shape or SHAPES[name], generator=generator)


def outputs(model: nn.Module, **changes: Tensor) -> Tensor:
    """Every floating-point number that a model puts out for its batch, in one row."""
    torch.manual_seed(0)  # for those that draw
    put = model(**{**batch(getattr(model, "get_base_model", lambda: model)()), **changes})
    row = torch.cat([tensor.flatten().float() for tensor in _tensors(put.to_tuple())])
    return row.nan_to_num(0.0, 0.0, 0.0)  # some put out infinities where something is masked


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (tuple, list)) else []
