"""How a checkpoint can state the widths that a model's FFNs have: one for all, or layer by layer."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .every import AnyFFN, find_all
from .layers import LayerList, layer_of, why_not_rebuilt
from .width import width_place

MARK = "narrow_layers"
"""The class attribute by which a model is known that a generated modelling file has built."""


@dataclass
class StatedWidths:
    """What a config says for the FFNs of a model to have their widths.

    Args:
        stock: transformers' own class of the model.
        values: (path of the config within the model's, attribute) -> the width of all FFNs that it governs.
        layers: path of the config -> number of a layer -> attribute -> width, where they differ from each other.
        lists: the lists of those layers; empty where the stock class builds the model.
    """

    stock: type[PreTrainedModel]
    values: dict[tuple[str, str], int] = field(default_factory=dict)
    layers: dict[str, dict[int, dict[str, int]]] = field(default_factory=dict)
    lists: list[LayerList] = field(default_factory=list)

    def apply(self, config: PreTrainedConfig) -> None:
        """Writes the widths that all layers share into a config."""
        for (place, attribute), width in self.values.items():
            setattr(_reachable(config)[place], attribute, width)

    def by_layer(self, config: dict[str, Any]) -> dict[str, Any]:
        """Adds the widths that differ to a config in JSON, as transformers' `per_layer_config`."""
        config = dict(config)
        for place, layers in self.layers.items():
            told = {"per_layer_config": {str(number): own for number, own in sorted(layers.items())}}
            config = {**config, **({place: {**config[place], **told}} if place else told)}
        return config


def state_widths(model: nn.Module, widths: Mapping[str, int]) -> StatedWidths:
    """Finds out how a checkpoint states widths; the model is built on the meta device for that, without weights.

    Args:
        model: the model, with or without adapters; not changed.
        widths: FFN name -> the width that it is to have; an FFN that is not named keeps the config's.

    Raises:
        ValueError: if no checkpoint can state them, naming the family and what would work.
    """
    stock = stock_class(model)
    try:
        built = on_meta(stock, stock_config(model))
    except (TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{stock.__name__} cannot be built of its config without weights ({error}).") from error
    ffns = {ffn.name: ffn for ffn in find_all(built)}
    foreign = [name for name in widths if name not in ffns]
    if foreign:
        raise ValueError(
            f"{stock.__name__} has no FFN {foreign[0]!r}: modules were added to the model that its config does not "
            "state. Save its state dict, and the code that builds it, yourself."
        )
    stated, reachable = StatedWidths(stock), _reachable(built.config)
    for (place, attribute), governed in _by_place(built, list(ffns.values()), reachable).items():
        wanted = {ffn.name: widths.get(ffn.name, ffn.width) for ffn, _ in governed}
        values = {wanted[ffn.name] / factor for ffn, factor in governed}
        changed = [ffn for ffn, _ in governed if wanted[ffn.name] != ffn.width]
        if changed and not attribute:
            raise ValueError(
                f"No checkpoint of {stock.__name__} can state that the FFN {changed[0].name!r} is "
                f"{wanted[changed[0].name]} wide: its config has no attribute for the width. Keep the adapter."
            )
        if changed and len(values) == 1 and (value := values.pop()) == int(value):
            stated.values[place, attribute] = int(value)
        elif changed and any(factor != 1 for _, factor in governed):
            raise _refusal(built, attribute, "shared experts are stated as a multiple of the routed ones")
        elif changed:
            _state_by_layer(stated, built, place, attribute, wanted)
            _check_readable(stated, built, attribute)
    return stated


def stock_class(model: nn.Module) -> type[PreTrainedModel]:
    """Transformers' own class of a model.

    Raises:
        ValueError: if it is a class of someone else's.
    """
    own = [c for c in type(model).__mro__ if c.__module__.startswith("transformers.models.")]
    if own and (own[0] is type(model) or hasattr(type(model), MARK)):
        return own[0]
    raise ValueError(
        f"{type(model).__name__} is no model class of transformers' own, so there is no stock code that its checkpoint "
        "could be loaded by. Merge it (`merge_and_unload()`) and save its state dict beside the code that builds it."
    )


def stock_config(model: Any) -> PreTrainedConfig:
    """A copy of a model's config without what an earlier export added to it."""
    config = copy.deepcopy(model.config)
    if hasattr(type(model), MARK):
        for part in _reachable(config).values():
            part.per_layer_config = None
            vars(part).pop("allow_global_per_layer_attribute_access", None)
        vars(config).pop("auto_map", None)
    return config


def on_meta(kind: type[PreTrainedModel], config: PreTrainedConfig) -> Any:
    """A model without weights."""
    with torch.device("meta"):
        return kind(config)


def _by_place(
    model: Any, ffns: list[AnyFFN], reachable: Mapping[str, PreTrainedConfig]
) -> dict[tuple[str, str], list[tuple[AnyFFN, int]]]:
    """The FFNs, and of what multiple their width is, by where it is stated: the config's path, and the attribute."""
    found = defaultdict(list)
    for ffn in ffns:
        place = width_place(model, ffn)
        paths = [path for path, config in reachable.items() if any(config is one for one in place.configs)]
        found[(paths[0], place.attribute) if paths else ("", "")].append((ffn, place.factor))
    return found


def _reachable(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """A config and those within it, by name; "" for itself."""
    inner = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", ())}
    return {"": config, **{name: one for name, one in inner.items() if isinstance(one, PreTrainedConfig)}}


def _state_by_layer(stated: StatedWidths, model: Any, place: str, attribute: str, widths: Mapping[str, int]) -> None:
    """Adds what the layers of one group of FFNs need to have different widths."""
    config = _reachable(model.config)[place]
    layers = stated.layers.setdefault(place, {})
    for name, width in widths.items():
        found = layer_of(model, name, getattr(config, "num_hidden_layers", None))
        if found is None:
            raise _refusal(model, attribute, f"{name!r} is in no list of `config.num_hidden_layers` layers")
        layer_list, number = found
        if layers.setdefault(number, {}).setdefault(attribute, width) != width:
            raise _refusal(model, attribute, f"FFNs of layer {number} differ from each other")
        if width != getattr(config, attribute) and (reason := why_not_rebuilt(model, layer_list, number)):
            raise _refusal(model, attribute, reason)
        if layer_list not in stated.lists:
            stated.lists.append(layer_list)


def _check_readable(stated: StatedWidths, model: Any, attribute: str) -> None:
    """Refuses what transformers' own config cannot be read with (BART's, whose halves have attributes of their own)."""
    try:
        type(model.config).from_dict(stated.by_layer(model.config.to_dict()))
    except RuntimeError as error:
        raise _refusal(model, attribute, f"transformers cannot read such a {type(model.config).__name__}") from error


def _refusal(model: Any, attribute: str, reason: str) -> ValueError:
    return ValueError(
        f"No checkpoint of {type(model).__name__} can state different widths under `config.{attribute}`: {reason}. "
        "Fuse all of these FFNs to one width, which stock transformers loads (`intermediate_size`, or `ratio` without "
        "`layers_to_transform`), or keep the adapter."
    )
