"""Looks into FFNs, or into any modules, while their model runs; with `observe/` the only place that registers hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from .every import AnyFFN

Listener = Callable[[str, Tensor], Tensor | None]
Before = Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]
After = Callable[[nn.Module, tuple[Any, ...], Any], Any]


@contextmanager
def capture(
    ffns: Iterable[AnyFFN],
    *,
    inputs: Listener | None = None,
    hidden: Listener | None = None,
    outputs: Listener | None = None,
) -> Iterator[None]:
    """Shows what goes through FFNs, call by call, as long as the block runs.

    Each listener gets the FFN's name and a tensor, and may return another to go on with in its place.

    Args:
        ffns: the FFNs; of routed experts only `outputs` tells, of all those of a layer together.
        inputs: called once a call with what goes into the in-projections, shape (..., in_dim).
        hidden: called with what goes into the out-projection, shape (..., neurons).
        outputs: called with what comes out of it, shape (..., out_dim).
    """
    with ExitStack() as stack:
        for ffn in ffns:
            *ins, out = ffn.projections
            if inputs is not None:
                stack.enter_context(watch(ins, before=_first_of(ffn.name, len(ins), inputs)))
            if hidden is not None and ins:
                stack.enter_context(watch([out], before=_told_before(ffn.name, hidden)))
            if outputs is not None:
                stack.enter_context(watch([out], after=_told_after(ffn.name, outputs)))
        yield


@contextmanager
def watch(modules: Iterable[nn.Module], before: Before | None = None, after: After | None = None) -> Iterator[None]:
    """Has modules tell of their calls as long as the block runs; see torch's forward (pre-)hooks for the signatures."""
    with ExitStack() as stack:
        for module in modules:
            if before is not None:
                stack.callback(module.register_forward_pre_hook(before).remove)
            if after is not None:
                stack.callback(module.register_forward_hook(after).remove)
        yield


def _first_of(name: str, count: int, listener: Listener) -> Before:
    """Tells of the first of an FFN's in-projections in each call, whichever that is, and moves all of them alike."""
    called: list[Tensor | None] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        moved = called[0] if called else listener(name, args[0])
        called.append(moved)
        if len(called) == count:
            called.clear()
        return None if moved is None else (moved, *args[1:])

    return hook


def _told_before(name: str, listener: Listener) -> Before:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        moved = listener(name, args[0])
        return None if moved is None else (moved, *args[1:])

    return hook


def _told_after(name: str, listener: Listener) -> After:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return listener(name, output)

    return hook
