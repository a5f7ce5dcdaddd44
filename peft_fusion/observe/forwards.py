"""Modules whose forward is another one for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

Forward = Callable[..., Any]


@contextmanager
def with_forwards(modules: Sequence[nn.Module], make: Callable[[nn.Module], Forward]) -> Iterator[None]:
    """Has modules run other forwards as long as the block runs; hooks around them, accelerate's too, stay.

    Args:
        modules: the modules, none of them twice.
        make: makes the forward that a module runs; called while that still has its own.
    """
    own = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            vars(module)["forward"] = make(module)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward
