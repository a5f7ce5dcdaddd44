"""What "auto" comes to: the recipe settled before any of the work, and what cannot be had refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .kernels import KERNELS, find_kernel
from .methods import METHODS, Method, find_method
from .recipe import AUTO, Recipe


def settle(asked: Recipe, calibrated: str = "", gradients: bool = False) -> Recipe:
    """The recipe that is used where this one is asked for.

    Args:
        asked: the recipe, with "auto" where any choice will do.
        calibrated: what statistics there are, in words; "" if the model was not calibrated.
        gradients: whether they hold the Fisher information.

    Returns:
        The recipe, with nothing left to "auto" and everything in it that was asked for.

    Raises:
        ValueError: if what is asked for cannot be used by the method, needs a calibration and there is none, or
            cannot be had together.
    """
    method = find_method(asked.method)
    _check_method(asked, method)
    calibrated = calibrated if method.calibrated else ""
    _check_calibration(asked, bool(calibrated), gradients)
    kernel = asked.kernel if asked.kernel != AUTO else _best_kernel(method, bool(calibrated), gradients)
    representative = asked.representative
    if representative == AUTO:
        choices = method.representatives or ("centroid",)
        representative = "neuron" if KERNELS[kernel].needs_statistics and "neuron" in choices else choices[0]
    counted = method.counts and representative == "centroid"
    if asked.scale == "counts" and not counted:
        raise ValueError(
            '`scale="counts"` are sizes of clusters, and a real neuron, which stands for a cluster here, has none. Set '
            '`representative="centroid"` as well, or leave `scale` at "auto".'
        )
    refit = "ridge" if calibrated else "none"
    scale = "ntk" if calibrated else "counts" if counted else "none"
    return replace(
        asked,
        kernel=kernel,
        representative=representative,
        refit=refit if asked.refit == AUTO else asked.refit,
        scale=scale if asked.scale == AUTO else asked.scale,
        calibration=calibrated,
    )


def check_calibratable(asked: Recipe) -> None:
    """Refuses to collect data for a method that uses none, and for what cannot be had with it.

    Raises:
        ValueError: naming the methods that do, or the setting.
    """
    if not find_method(asked.method).calibrated:
        able = " and ".join(name for name, method in METHODS.items() if method.calibrated)
        raise ValueError(
            f'`method="{asked.method}"` makes narrow FFNs of weights alone and cannot be calibrated; {able} can.'
        )
    settle(asked, "what is collected", gradients=True)


def _best_kernel(method: Method, calibrated: bool, gradients: bool) -> str:
    """The first of a method's kernels for which enough is known."""

    def usable(name: str) -> bool:
        kernel = KERNELS[name]
        return (calibrated or not kernel.needs_statistics) and (gradients or not kernel.needs_gradients)

    return next(filter(usable, method.kernels))


def _check_method(asked: Recipe, method: Method) -> None:
    """Refuses what the method cannot use, calibrated or not."""
    needs: dict[str, Callable[[Method], bool]] = {}
    if asked.kernel != AUTO:
        find_kernel(asked.kernel)
        needs[f'kernel="{asked.kernel}"'] = lambda other: asked.kernel in other.kernels
    if asked.representative != AUTO:
        needs[f'representative="{asked.representative}"'] = lambda other: asked.representative in other.representatives
    if asked.refit not in (AUTO, "none"):
        needs[f'refit="{asked.refit}"'] = lambda other: other.calibrated
    if asked.scale == "ntk":
        needs['scale="ntk"'] = lambda other: other.calibrated
    if asked.scale == "counts":
        needs['scale="counts"'] = lambda other: other.counts
    for name, unset in (("keep_neurons", 0), ("n_init", None), ("max_iter", None)):
        if getattr(asked, name) != unset:
            needs[f"{name}={getattr(asked, name)}"] = lambda other, name=name: name in other.takes  # type: ignore[misc]
    for setting, able in needs.items():
        if not able(method):
            names = " and ".join(name for name, other in METHODS.items() if able(other))
            raise ValueError(f'`{setting}` works with `method` {names}, but got "{asked.method}".')


def _check_calibration(asked: Recipe, calibrated: bool, gradients: bool) -> None:
    """Refuses what needs to know more than there is."""
    kernel = KERNELS.get(asked.kernel)
    needs = {
        "kernel": kernel is not None and kernel.needs_statistics,
        "representative": asked.representative == "neuron" and "centroid" in METHODS[asked.method].representatives,
        "refit": asked.refit not in (AUTO, "none"),
        "scale": asked.scale == "ntk",
    }
    for name, needed in needs.items():
        if needed and not calibrated:
            raise ValueError(
                f'`{name}="{getattr(asked, name)}"` needs to know what goes through the FFNs: call `calibrate(model, '
                f'config, dataloader)` with this configuration first, or leave `{name}` at "auto".'
            )
    if kernel is not None and kernel.needs_gradients and not gradients:
        raise ValueError(
            f'`kernel="{asked.kernel}"` needs gradients, and this model has none; `kernel="outputs"` does not.'
        )
