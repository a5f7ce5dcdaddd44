"""The modelling file of a checkpoint whose FFNs differ in width: transformers' own class, some layers built anew.

It needs transformers alone. What it takes care of:
- the stock code reads the width from the model's config, which has to be allowed where layers have their own;
- a module of a layer that was built anew has to hold the model's config, or settings made later would miss it;
- its class must have a name that no library knows, or that library would take its own class for it.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from ..ffn import MARK, LayerList, StatedWidths, on_meta

FILE = "modeling_narrow.py"

TEXT = '''"""{stock}, in which some layers' FFNs are narrower than others: `config.per_layer_config` states them.

Written by peft-fusion; it needs transformers alone. The stock model is built first, then every layer that the config
states something of, by `type(layer)` and the config of that layer.
"""

{imports}


def with_readable_widths(config):
    """Lets the stock code read what differs from layer to layer: it builds every layer at the common width."""
    for name in ("", *config.sub_configs):
        part = getattr(config, name) if name else config
        if part is not None:
            part.allow_global_per_layer_attribute_access = True
    return config


def build_layers(owner, layers, index):
    """Builds those layers anew whose config is not the model's.

    Args:
        owner: the module that has the config.
        layers: its list of layers.
        index: the argument by which their class takes a layer's number, or "".
    """
    config = owner.config
    for number, layer in enumerate(layers):
        own = config.per_layer_config[number]
        names = config.per_layer_attributes or ()
        if all(getattr(own, name) == getattr(config, name) for name in names):
            continue
        layers[number] = type(layer)(own, **({{index: number}} if index else {{}}))
        for module in layers[number].modules():
            if getattr(module, "config", None) is own:
                module.config = config  # settings that are made later reach this layer, too
'''

CLASS = '''

class {name}({stock}):
    """{stock} with layers of different widths."""

    {mark} = {lists!r}

    def __init__(self, config, *args, **kwargs):
        super().__init__(with_readable_widths(config), *args, **kwargs)
        for owner, path, index in self.{mark}:
            build_layers(self.get_submodule(owner), self.get_submodule(path), index)
        self.init_weights()
'''


def modelling_file(stated: StatedWidths, base: type[PreTrainedModel], prefix: str) -> str:
    """The text of the file.

    Args:
        stated: the widths, by layer.
        base: the class of the model without its head; the same as with it if there is none.
        prefix: the attribute by which the model with a head holds it.
    """
    classes = {stated.stock: stated.lists}
    if base is not stated.stock and _within(stated.lists, prefix) is not None:
        classes = {base: _within(stated.lists, prefix) or [], **classes}
    text = TEXT.format(stock=stated.stock.__name__, imports="\n".join(sorted(map(_import, classes))))
    for kind, lists in classes.items():
        rows = [(one.owner, one.path, one.index) for one in lists]
        text += CLASS.format(name=narrow_name(kind), stock=kind.__name__, mark=MARK, lists=rows)
    return text


def auto_map(stated: StatedWidths, base: type[PreTrainedModel], prefix: str, model_type: str) -> dict[str, str]:
    """What a config says for transformers' auto classes to find the classes of the file."""
    module = FILE.removesuffix(".py")
    found = {auto: f"{module}.{narrow_name(stated.stock)}" for auto in auto_classes(stated.stock, model_type)}
    if base is stated.stock or _within(stated.lists, prefix) is not None:
        found["AutoModel"] = f"{module}.{narrow_name(base)}"
    return found


def auto_classes(kind: type[PreTrainedModel], model_type: str) -> list[str]:
    """The auto classes that load a class of transformers' own, the most telling first."""
    found = []
    autos = {name: auto for name, auto in vars(modeling_auto).items() if name.startswith("AutoModel")}
    for name, auto in autos.items():
        mapping = getattr(getattr(auto, "_model_mapping", None), "_model_mapping", {})
        known = mapping.get(model_type, ())
        if kind.__name__ in ((known,) if isinstance(known, str) else known):
            found.append(name)
    return sorted(found, key=lambda name: (name == "AutoModelForPreTraining", not name.startswith("AutoModelFor")))


def narrow_name(kind: type[PreTrainedModel]) -> str:
    """A class's name in the file."""
    return f"Narrow{kind.__name__}"


def build_from(text: str, name: str, config: Any) -> Any:
    """The model that the file builds of a config, on the meta device."""
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(compile(text, FILE, "exec"), namespace)
    return on_meta(namespace[name], config)


def _within(lists: list[LayerList], prefix: str) -> list[LayerList] | None:
    """Lists of layers as seen from the module at a prefix; None if one lies elsewhere."""
    if not all(one.path.startswith(f"{prefix}.") and f"{one.owner}.".startswith(f"{prefix}.") for one in lists):
        return None
    cut = len(prefix) + 1
    return [LayerList(one.path[cut:], one.owner[cut:], one.index) for one in lists]


def _import(kind: type[PreTrainedModel]) -> str:
    """The line that imports a class."""
    at_the_top = getattr(transformers, kind.__name__, None) is kind
    return f"from {'transformers' if at_the_top else kind.__module__} import {kind.__name__}"
