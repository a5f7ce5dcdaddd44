"""What lies between an FFN's projections must be known, or its neurons cannot be merged one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from .find import FFN, across_neurons, features, function_name
from .probe import difference, run_with_stubs
from .storage import blank_like
from .structure import attributes_between, modules_between, runs_plainly

Item = TypeVar("Item")

# What code raises that cannot do with what it is given here. Anything else, out-of-memory with it, goes through.
CANNOT_RUN = (TypeError, ValueError, AttributeError, LookupError, AssertionError, UnboundLocalError, RuntimeError)


def check_between(ffns: Iterable[FFN]) -> None:
    """Refuses FFNs that do more between their projections than their layout says; of those alike, one is tried.

    Args:
        ffns: the FFNs; they are left as they are, as is torch's global random state.

    Raises:
        ValueError: naming the first such FFN, what is between its projections, and what to do.
    """
    found = first_problem(ffns, _kind, _problem)
    if found is not None:
        first, more, problem = found
        raise ValueError(
            f"The FFN {first.name!r}{more}, of a {type(first.holder).__name__}, cannot be fused: {problem}. Leave "
            "it out with `exclude_modules`, or say with `register_layout` where its neurons are."
        )


def first_problem(
    items: Iterable[Item], kind: Callable[[Item], object], problem: Callable[[Item], str | None]
) -> tuple[Item, str, str] | None:
    """Tries one of those that are alike, and finds the first with a problem.

    Args:
        items: what is tried.
        kind: the same for those that behave alike.
        problem: tries one, and says what is wrong with it, if anything.

    Returns:
        It, how many more are like it in words, and its problem; None if there is none.
    """
    alike: dict[object, list[Item]] = {}
    for item in items:
        alike.setdefault(kind(item), []).append(item)
    for first, *others in alike.values():
        if (found := problem(first)) is not None:
            return first, f" (and {len(others)} more like it)" if others else "", found
    return None


def _kind(ffn: FFN) -> tuple[object, ...]:
    """What FFNs have in common that behave alike."""
    scalars = ((k, v) for k, v in vars(ffn.holder).items() if isinstance(v, (bool, int, float, str, type(None))))
    modules = ((name, type(module)) for name, module in ffn.holder.named_modules())
    stored = ((features(module), blank_like(module).dtype) for module in ffn.base_projections)
    return type(ffn.holder), ffn.layout, function_name(ffn.activation), *map(tuple, (scalars, modules, stored))


def _problem(ffn: FFN) -> str | None:
    """What makes it wrong to merge an FFN's neurons, or None."""
    crossing = across_neurons(ffn)
    if crossing is not None:
        return f"`{crossing}` computes across its neurons, so that merging some of them changes what it does to all"
    named = ", ".join(f"`{path}` ({type(module).__name__})" for path, module in modules_between(ffn))
    for fill in (torch.ones_like, _none) if runs_plainly(ffn) else ():
        try:
            found = difference(run_with_stubs(ffn, fill), run_with_stubs(ffn, fill, moved=True))
        except torch.OutOfMemoryError:
            raise
        except CANNOT_RUN:
            continue
        named = named or ", ".join(f"`{name}`" for name in attributes_between(ffn))
        return f"{found}; beside them it has {named}" if found and named else found
    return f"{named} may compute across its neurons, and its code cannot be tried by itself" if named else None


def _none(x: Tensor) -> None:
    return None
