"""`Recipe`: how narrow FFNs are made, in one object that everything below the configuration reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

AUTO = "auto"
"""Of a setting that is still to be settled."""

REPRESENTATIVES = ("centroid", "neuron")
REFITS = ("ridge", "sequential", "none")
SCALES = ("counts", "ntk", "none")

_RECORDED = ("method", "kernel", "representative", "refit", "scale", "calibration")


@dataclass(frozen=True)
class Recipe:
    """How narrow FFNs are made. As a user asks for it settings may be "auto"; `settle` leaves none.

    Args:
        method: a key of `methods.METHODS`.
        kernel: what neurons are compared by, a key of `kernels.KERNELS`.
        representative: what stands for a cluster: "centroid", its mean, or "neuron", a real one.
        refit: "ridge" (the out-projection is fitted anew), "sequential" (so it is, and then once more, layer after
            layer, to make up for what the narrow FFNs before it have changed) or "none".
        scale: "counts" (the clusters' sizes), "ntk" (the original's tangent kernel) or "none".
        keep_neurons: for "sketch": so many of the largest neurons are kept exactly.
        n_init: restarts of the clustering; None: the engine's default.
        max_iter: iterations of the clustering; None: the engine's default.
        seed: of all that is drawn at random.
        calibration: what the statistics were collected from, in words; "" where none are used.

    Raises:
        ValueError: if there is no such representative, refit or scale.
    """

    method: str = "fusion"
    kernel: str = AUTO
    representative: str = AUTO
    refit: str = AUTO
    scale: str = AUTO
    keep_neurons: int = 0
    n_init: int | None = None
    max_iter: int | None = None
    seed: int = 0
    calibration: str = ""

    def __post_init__(self) -> None:
        choices = {"representative": REPRESENTATIVES, "refit": REFITS, "scale": SCALES}
        for name, known in choices.items():
            if getattr(self, name) not in (AUTO, *known):
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, but got {getattr(self, name)!r}.")

    def to_dict(self) -> dict[str, str]:
        """What an adapter's configuration records of it: what "auto" came to, and the calibration."""
        return {name: getattr(self, name) for name in _RECORDED}

    @classmethod
    def from_dict(cls, recorded: Mapping[str, Any]) -> Recipe:
        """The recipe that an adapter's configuration records.

        Raises:
            ValueError: if it is no such record.
        """
        if set(recorded) != set(_RECORDED) or not all(isinstance(value, str) for value in recorded.values()):
            raise ValueError(f"A recorded recipe has {', '.join(_RECORDED)}, each a str, but this one is {recorded}.")
        return cls(**recorded)
