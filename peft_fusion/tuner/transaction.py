"""All or nothing: whatever ends a change of a model early, an interrupt included, the model is as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from .config import FusionConfig

Contents = list[tuple[Any, Any]]
"""Containers, each with a copy of what was in it."""


@contextmanager
def all_or_nothing(model: nn.Module, *others: object) -> Iterator[None]:
    """Puts everything back that a block changed in a model, unless the block comes to its end.

    Modules, parameters and buffers, what requires a gradient, modes, hooks, adapters and where they are active, what
    is merged or set aside, the configs: whatever is an attribute of a module or of its config, or is in a list, a dict
    or a set that is one. Tensors' values are not copied: what changes a model here puts other tensors in their place.

    Args:
        model: the model.
        others: further objects whose attributes are put back, or dicts.
    """
    before = Snapshot(model, others)
    try:
        yield
    except BaseException:
        before.restore()
        raise


@contextmanager
def while_added(given: Mapping[str, Any]) -> Iterator[None]:
    """Around all that PEFT or transformers do to put a new fusion adapter in place, our tuner's part among it.

    Args:
        given: what the method was called with: name -> argument.
    """
    config = given.get("peft_config", given.get("adapter_config"))
    if not isinstance(config, FusionConfig):
        yield
        return
    with all_or_nothing(given.get("model", given["self"]), config):
        yield


class Snapshot:
    """What a model and some objects consist of.

    Args:
        model: the model.
        others: further objects, as for `all_or_nothing`.
    """

    def __init__(self, model: nn.Module, others: tuple[object, ...] = ()) -> None:
        modules = list(model.modules())
        configs = {
            id(c): c for m in modules if (c := getattr(m, "config", None)) is not None and hasattr(c, "__dict__")
        }
        holders = [*modules, *configs.values(), *(other for other in others if hasattr(other, "__dict__"))]
        self._attributes = [(vars(holder), dict(vars(holder))) for holder in holders]
        values = [value for _, attributes in self._attributes for value in attributes.values()]
        self._contents: Contents = [
            (value, value.copy()) for value in (*values, *others) if isinstance(value, (dict, list, set))
        ]
        self._trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Puts all of it back, in the same containers."""
        for own, attributes in self._attributes:
            own.clear()
            own.update(attributes)
        for container, content in self._contents:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, requires_grad in self._trainable:
            parameter.requires_grad_(requires_grad)
