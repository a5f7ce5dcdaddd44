"""What a `FusionConfig` refuses, field by field."""

from __future__ import annotations

import math
from typing import Any


def check_widths(config: Any) -> None:
    """Refuses widths that no FFN can have, or that contradict each other.

    Args:
        config: a `FusionConfig`, as of all checks.

    Raises:
        ValueError: naming the field, as all checks do.
    """
    _check_ratio("ratio", config.ratio)
    _check_integer("multiple_of", config.multiple_of, least=1)
    size, allocation = config.intermediate_size, config.allocation
    if size is not None:
        _check_integer("intermediate_size", size, least=1)
    if size is not None and allocation != "uniform":
        raise ValueError(
            f'`intermediate_size={size}` is one width for all, and `allocation="{allocation}"` gives each FFN its own: '
            "give the average as `ratio`."
        )
    if not isinstance(config.width_pattern, dict):
        raise ValueError(f"`width_pattern` must be a dict of regex -> width, but got {config.width_pattern!r}.")
    for pattern, value in config.width_pattern.items():
        name = f"width_pattern[{pattern!r}]"
        if isinstance(value, float):
            _check_ratio(name, value)
        elif value == 1 and not isinstance(value, bool) and not config.fused:
            raise ValueError(f"`{name}` is 1, one neuron, where `ratio=1` is all. Write 1.0 for full width.")
        else:
            _check_integer(name, value, least=1)


def check_integers(config: Any) -> None:
    """Refuses settings of the methods that are no integers, or too small."""
    _check_integer("keep_neurons", config.keep_neurons, least=0)
    for name in ("n_init", "max_iter"):
        if getattr(config, name) is not None:
            _check_integer(name, getattr(config, name), least=1)
    if isinstance(config.seed, bool) or not isinstance(config.seed, int):
        raise ValueError(f"`seed` must be an integer, but got {config.seed!r}.")


def check_layers(config: Any) -> None:
    """Refuses layers that are no indices."""
    layers = config.layers_to_transform
    if config.layers_pattern and layers is None:
        raise ValueError("`layers_pattern` counts the layers for `layers_to_transform`: give that as well.")
    for index in layers if isinstance(layers, list) else [] if layers is None else [layers]:
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"`layers_to_transform` must be an index from 0 on or a list of such, but got {layers!r}.")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuses what is not among a field's choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but got {value!r}.")


def _check_ratio(name: str, value: object) -> None:
    """Refuses what is not a fraction; an integer 1 is taken for full width."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 < value <= 1:  # type: ignore[operator, arg-type]
        raise ValueError(f"`{name}` must be a number above 0 and at most 1, but got {value!r}.")


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, but got {value!r}.")
