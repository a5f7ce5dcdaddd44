"""Where a layer adds up: in what it passes on, or in front of the norm that it ends with, as BERT's do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ffn import watch
from .stretches import passed_on


@contextmanager
def added_up(norm: nn.Module | None) -> Iterator[Callable[[Any], Tensor]]:
    """Tells of the sum in a layer that runs once as long as the block does.

    Args:
        norm: what the layer ends with, if it adds up in front of that.

    Yields:
        What the layer puts out -> the sum: what went into the norm, or what is passed on.
    """
    inputs: list[Tensor] = []

    def note(module: nn.Module, args: Any) -> None:
        inputs.append(args[0])

    with watch([] if norm is None else [norm], before=note):
        yield lambda output: passed_on(output) if norm is None else inputs[-1].reshape(passed_on(output).shape)


@contextmanager
def ends_with(layer: nn.Module) -> Iterator[Callable[[Any], nn.Module | None]]:
    """Finds what a layer that runs as long as the block does ends with.

    Args:
        layer: the layer.

    Yields:
        What the layer puts out -> its part, one without parts, that put just this out of one tensor of that size;
        None if the layer passes on anything else.
    """
    calls: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if args and all(isinstance(value, Tensor) for value in (args[0], output)) and args[0].shape == output.shape:
            calls.append((module, output))

    def found(output: Any) -> nn.Module | None:
        passed = passed_on(output)
        sized = [(module, y) for module, y in calls if y.shape[-1] == passed.shape[-1] and y.numel() == passed.numel()]
        same = [module for module, y in sized if torch.equal(y.reshape(passed.shape).to(passed.device), passed)]
        return same[-1] if same and [module for module, _ in calls].count(same[-1]) == 1 else None

    with watch([part for part in layer.modules() if not list(part.children())], after=note):
        yield found
