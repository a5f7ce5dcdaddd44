"""Which FFNs a configuration means, and how narrow each becomes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .every import AnyFFN
from .experts import GROUPED, Experts

Target = str | Sequence[str] | None


@dataclass(frozen=True)
class Selection:
    """The part of a configuration that says which FFNs are meant; the fields are LoRA's."""

    target_modules: Target = None
    exclude_modules: Target = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None


def select_ffns(ffns: Sequence[AnyFFN], selection: Selection) -> list[AnyFFN]:
    """The FFNs that a selection means.

    A target is a suffix (in a list) or a regular expression (a string, matched in full), as in LoRA; it may name
    the module that holds an FFN, or all of the FFN's projections.

    Args:
        ffns: the FFNs of the model, from `find_ffns`.
        selection: what is asked for.

    Returns:
        The selected FFNs, in the model's order.

    Raises:
        ValueError: if a target matches no FFN, only a part of an FFN is targeted or excluded, a layer index is
            out of range, or nothing is left.
    """
    _check_targets_match(ffns, selection.target_modules, "target_modules")
    _check_targets_match(ffns, selection.exclude_modules, "exclude_modules")
    chosen = [
        ffn
        for ffn in ffns
        if (selection.target_modules is None or _matches(ffn, selection.target_modules, "target_modules"))
        and not (selection.exclude_modules and _matches(ffn, selection.exclude_modules, "exclude_modules"))
        and not _is_inside(ffn, selection.modules_to_save or ())
    ]
    if selection.layers_to_transform is not None:
        chosen = _in_layers(chosen, selection.layers_to_transform, selection.layers_pattern)
    if not chosen:
        raise ValueError(
            f"No FFN is left to fuse: `target_modules`={selection.target_modules!r}, `exclude_modules`="
            f"{selection.exclude_modules!r}, `modules_to_save`={selection.modules_to_save!r}, "
            f"`layers_to_transform`={selection.layers_to_transform!r} leave out all of {describe(ffns)}."
        )
    return chosen


def target_widths(
    ffns: Sequence[AnyFFN],
    ratio: float,
    intermediate_size: int | None,
    width_pattern: dict[str, float],
    multiple_of: int,
    steps: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """How many neurons each FFN keeps.

    Args:
        ffns: the FFNs to fuse.
        ratio: fraction of the neurons kept where nothing else is said, rounded up to `multiple_of`.
        intermediate_size: the width itself; wins over `ratio`.
        width_pattern: regular expression of an FFN's name (or its end) -> width (int) or ratio (float); wins
            over both.
        multiple_of: what a width that comes from a ratio is a multiple of, unless that exceeds the full width.
        steps: FFN name -> the same for one FFN, from `width_steps`; wins over `multiple_of`.

    Returns:
        FFN name -> width.

    Raises:
        ValueError: if a width is above the full one or experts cannot have it, or a pattern matches none of the FFNs.
    """
    for pattern in width_pattern:
        if not any(_matches_pattern(ffn, pattern) for ffn in ffns):
            raise ValueError(
                f"`width_pattern` has the key {pattern!r}, which matches none of the FFNs to fuse: {describe(ffns)}."
            )
    widths = {}
    for ffn in ffns:
        default = ratio if intermediate_size is None else intermediate_size
        asked = next((v for p, v in width_pattern.items() if _matches_pattern(ffn, p)), default)
        if isinstance(asked, float):
            step = (steps or {}).get(ffn.name, multiple_of)
            asked = min(ffn.width, step * math.ceil(asked * ffn.width / step))
        if asked > ffn.width:
            raise ValueError(
                f"The FFN {ffn.name!r} has {ffn.width} neurons and cannot be given {asked}. Lower "
                "`intermediate_size` or the entry in `width_pattern`."
            )
        if isinstance(ffn, Experts) and asked % GROUPED and asked != ffn.width:
            raise ValueError(
                f"The experts {ffn.name!r} cannot be given {asked} neurons: the implementations that multiply several "
                f"experts' matrices at once need a multiple of {GROUPED}. Change `intermediate_size` or the entry in "
                "`width_pattern`."
            )
        widths[ffn.name] = asked
    return widths


def with_own_width(ffns: Iterable[AnyFFN], width_pattern: Iterable[str]) -> set[str]:
    """The names of the FFNs that a `width_pattern` says something of."""
    patterns = list(width_pattern)
    return {ffn.name for ffn in ffns if any(_matches_pattern(ffn, pattern) for pattern in patterns)}


def describe(ffns: Sequence[AnyFFN], limit: int = 4) -> str:
    """A few FFNs in words, for messages."""
    shown = [f"{ffn.name or 'the model itself'} ({ffn.layout}, {ffn.width} neurons)" for ffn in ffns[:limit]]
    more = f" and {len(ffns) - limit} more" if len(ffns) > limit else ""
    return f"{len(ffns)} FFNs: " + "; ".join(shown) + more


def _names(ffn: AnyFFN) -> tuple[str, ...]:
    return (ffn.name, *ffn.projection_names)


def _matches_name(target: str | Iterable[str], name: str) -> bool:
    """LoRA's rule: a string is a regular expression of the whole name, a list holds suffixes."""
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in target)


def _matches(ffn: AnyFFN, target: str | Sequence[str], field: str) -> bool:
    """Whether a target means this FFN, by its own name or by all of its projections."""
    if _matches_name(target, ffn.name):
        return True
    hit = [name for name in ffn.projection_names if _matches_name(target, name)]
    if hit and len(hit) < len(ffn.projection_names):
        missing = [name for name in ffn.projection_names if name not in hit]
        raise ValueError(
            f"`{field}`={target!r} names {hit} but not {missing}: an FFN is fused as a whole, because its neurons "
            f"run through all of its projections. Name all of them, or the FFN itself ({ffn.name!r})."
        )
    return bool(hit)


def _check_targets_match(ffns: Sequence[AnyFFN], target: Target, field: str) -> None:
    """Every list entry (and a regular expression as a whole) has to mean some FFN or one of its projections."""
    if target is None or (not target and field == "exclude_modules"):
        return
    entries: list[str | list[str]] = [target] if isinstance(target, str) else [[entry] for entry in target]
    for entry in entries or [[]]:
        if not any(_matches_name(entry, name) for ffn in ffns for name in _names(ffn)):
            shown = entry if isinstance(entry, str) else (entry[0] if entry else [])
            raise ValueError(
                f"`{field}` has {shown!r}, which matches no FFN. Found {describe(ffns)}. Give the end of a name in a "
                "list, a regular expression of a full name as a string, or leave it out to take every FFN."
            )


def _is_inside(ffn: AnyFFN, modules_to_save: Iterable[str]) -> bool:
    """Whether an FFN belongs to a module that is trained and saved in full."""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", ffn.projection_names[-1]) for name in modules_to_save)


def _layer_index(ffn: AnyFFN, patterns: Sequence[str]) -> int | None:
    """The number of the layer an FFN is in: the first number of its path, or the one behind a pattern."""
    name = ffn.projection_names[-1]
    for expression in [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] or [r"(?:.*?\.)??[^.]*\.(\d+)\."]:
        match = re.match(expression, name)
        if match:
            return int(match.group(1))
    return None


def _in_layers(
    ffns: Sequence[AnyFFN], layers: int | Sequence[int], layers_pattern: str | Sequence[str] | None
) -> list[AnyFFN]:
    wanted = {layers} if isinstance(layers, int) else set(layers)
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or ())
    index = {ffn.name: _layer_index(ffn, patterns) for ffn in ffns}
    unknown = wanted - set(index.values())
    if unknown:
        known = sorted({i for i in index.values() if i is not None})
        raise ValueError(
            f"`layers_to_transform` has {sorted(unknown)}, but the targeted FFNs are in layers {known}"
            + (f" of `layers_pattern`={layers_pattern!r}." if layers_pattern else ".")
        )
    return [ffn for ffn in ffns if index[ffn.name] in wanted]


def _matches_pattern(ffn: AnyFFN, pattern: str) -> bool:
    """LoRA's rule for `rank_pattern`: a regular expression of the end of a name, from a dot on."""
    return any(re.match(rf"(.*\.)?({pattern})$", name) for name in _names(ffn))
