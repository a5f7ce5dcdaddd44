"""What "auto" comes to: the recipe by which narrow FFNs are made, settled before any of the work."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .config import FusionConfig

CALIBRATED_METHODS = ("fusion", "pruning")
COUNTING_METHODS = ("fusion",)


@dataclass(frozen=True)
class Recipe:
    """How narrow FFNs are made; the fields are `FusionConfig`'s, with nothing left to "auto".

    Args:
        method: which method.
        kernel: what neurons are compared by: "weights", "outputs", "fisher" or "ntk".
        representative: what stands for a cluster: "centroid" or "neuron".
        refit: "ridge" or "none".
        scale: "counts", "ntk" or "none".
        calibration: what the statistics were collected from, in words; "" without any.
    """

    method: str
    kernel: str
    representative: str
    refit: str
    scale: str
    calibration: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As a saved adapter's configuration has it."""
        return asdict(self)


def settle(config: FusionConfig, calibration: str, gradients: bool = False) -> Recipe:
    """The recipe that a configuration comes to.

    Args:
        config: the configuration.
        calibration: what statistics there are, in words; "" if the model was not calibrated.
        gradients: whether they hold the Fisher information.

    Returns:
        The recipe.

    Raises:
        ValueError: if the configuration asks for what needs a calibration and there is none, or for what the method
            cannot use.
    """
    if config.fused and config.fused_by:
        return Recipe(**config.fused_by)
    usable = bool(calibration) and config.method in CALIBRATED_METHODS
    _check_calibrated(config, usable)
    kernel = config.kernel
    if kernel == "auto":
        informed = "fisher" if gradients and config.method == "fusion" else "outputs"
        kernel = informed if usable else "weights"
    if kernel == "fisher" and not gradients:
        raise ValueError('`kernel="fisher"` needs gradients, and this model has none; `kernel="outputs"` does not.')
    aware = usable and kernel != "weights"
    representative = config.representative
    if representative == "auto":
        representative = "neuron" if aware or config.method == "pruning" else "centroid"
    counted = representative == "centroid" and config.method in COUNTING_METHODS
    if config.scale == "counts" and config.method not in COUNTING_METHODS:
        raise ValueError(f'`scale="counts"` are sizes of clusters, which `method="{config.method}"` has none of.')
    return Recipe(
        method=config.method,
        kernel=kernel,
        representative=representative,
        refit=config.refit if config.refit != "auto" else ("ridge" if usable else "none"),
        scale=config.scale if config.scale != "auto" else ("ntk" if usable else "counts" if counted else "none"),
        calibration=calibration if usable else "",
    )


def _check_calibrated(config: FusionConfig, usable: bool) -> None:
    """Refuses what only a calibrated model, or only some methods, can have."""
    asked = {"kernel": ("outputs", "fisher", "ntk"), "refit": ("ridge",), "scale": ("ntk",)}
    for name, values in asked.items():
        value = getattr(config, name)
        if value in values and config.method not in CALIBRATED_METHODS:
            raise ValueError(
                f'`{name}="{value}"` works with `method` {" and ".join(CALIBRATED_METHODS)}, but got "{config.method}".'
            )
        if value in values and not usable:
            raise ValueError(
                f'`{name}="{value}"` needs to know what goes through the FFNs: call `calibrate(model, config, '
                f'dataloader)` with this configuration first, or leave `{name}` at "auto".'
            )
