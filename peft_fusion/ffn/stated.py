"""How a checkpoint can state the widths that a model's FFNs have: one for all, or layer by layer."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .every import AnyFFN, find_all
from .layers import LayerList, layer_of, why_not_rebuilt
from .stock import misbuilt, on_meta, reachable, stock_class, stock_config, write
from .width import WidthPlace, stated_value, width_place


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
    values: dict[tuple[str, str], Any] = field(default_factory=dict)
    layers: dict[str, dict[int, dict[str, int]]] = field(default_factory=dict)
    lists: list[LayerList] = field(default_factory=list)

    def apply(self, config: PreTrainedConfig) -> None:
        """Writes the widths that all layers share into a config."""
        write(config, self.values)

    def by_layer(self, config: dict[str, Any]) -> dict[str, Any]:
        """Adds the widths that differ to a config in JSON, as transformers' `per_layer_config`."""
        config = copy.deepcopy(config)
        for place, layers in self.layers.items():
            inner = config
            for name in place.split(".") if place else ():
                inner = inner[name]
            inner["per_layer_config"] = {str(number): own for number, own in sorted(layers.items())}
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
    stated = StatedWidths(stock)
    for paths, governed in _by_place(built, list(ffns.values())):
        place, wanted = governed[0][1], {ffn.name: widths.get(ffn.name, ffn.width) for ffn, _ in governed}
        changed = [ffn for ffn, _ in governed if wanted[ffn.name] != ffn.width]
        if changed and not place.attribute:
            raise ValueError(
                f"No checkpoint of {stock.__name__} can state that the FFN {changed[0].name!r} is "
                f"{wanted[changed[0].name]} wide: its config has no attribute for the width. Keep the adapter, or "
                f"leave out with `exclude_modules` what has none: {_named(changed)}."
            )
        value = stated_value([(own, wanted[ffn.name]) for ffn, own in governed])
        if changed and value is not None:
            told = ((place.attribute, value), *place.also)
            stated.values |= {(path, attribute): one for path in paths for attribute, one in told}
        elif changed and any(own.factor != 1 for _, own in governed):
            raise _refusal(built, place.attribute, f"it holds whole multiples of {place.factor}, of the same for all")
        elif changed:
            _state_by_layer(stated, built, paths[0], place.attribute, wanted)
            _check_readable(stated, built, place.attribute)
    if stated.values and not stated.lists and (found := misbuilt(stock, stock_config(model), stated.values, widths)):
        names = ", ".join(sorted({f"`config.{attribute}`" for _, attribute in stated.values}))
        raise ValueError(
            f"No checkpoint of {stock.__name__} can state these widths: of {names}, {found}. Keep the adapter, or "
            "leave these FFNs out with `exclude_modules`."
        )
    return stated


def _named(ffns: list[AnyFFN], limit: int = 6) -> str:
    """The names of FFNs, those of layers that are alike once, for messages."""
    names = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".N", ffn.name) for ffn in ffns))
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _by_place(model: Any, ffns: list[AnyFFN]) -> list[tuple[list[str], list[tuple[AnyFFN, WidthPlace]]]]:
    """The FFNs by where their width is stated: the config's paths, and each FFN with its place."""
    parts = reachable(model.config)
    found: dict[tuple[int, str], tuple[list[str], list[tuple[AnyFFN, WidthPlace]]]] = {}
    for ffn in ffns:
        place = width_place(model, ffn)
        paths = [path for path, config in parts.items() if any(config is one for one in place.configs)]
        place = place if paths else WidthPlace([], "")
        found.setdefault(place.key, (paths, []))[1].append((ffn, place))
    return list(found.values())


def _state_by_layer(stated: StatedWidths, model: Any, place: str, attribute: str, widths: Mapping[str, int]) -> None:
    """Adds what the layers of one group of FFNs need to have different widths."""
    config = reachable(model.config)[place]
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
