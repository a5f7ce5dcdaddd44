"""`GuardedTuner`: what can be refused is refused before the first layer changes."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTuner

from .layer import FusionLayer, check_one_active
from .transaction import all_or_nothing


class GuardedTuner(BaseTuner):
    """PEFT's tuner, which goes from layer to layer, with the checks of all fusion layers ahead of every change."""

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Sets the active adapters, at most one of them a fusion adapter; see `BaseTuner.set_adapter`.

        Raises:
            ValueError: if two fusion adapters would be active on one FFN.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for layer in self._fusion_layers():
            check_one_active([name for name in names if name in layer.mlp_fusion_narrow])
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def disable_adapter_layers(self) -> None:
        """Makes the model compute what the original does; see `BaseTuner.disable_adapter_layers`.

        Raises:
            RuntimeError: if the original weights were dropped.
        """
        self._require_originals()
        super().disable_adapter_layers()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges every active adapter, or the named ones; see `BaseTuner.merge_adapter`.

        Raises:
            ValueError: if there are NaNs under `safe_merge`, or two fusion adapters to merge; nothing is merged then.
        """
        self._check_merge(safe_merge, adapter_names)
        with all_or_nothing(self.model):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _fusion_layers(self) -> Iterator[FusionLayer]:
        return (module for module in self.model.modules() if isinstance(module, FusionLayer))

    def _check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        for layer in self._fusion_layers():
            layer.check_merge(safe_merge, adapter_names)

    def _require_originals(self) -> None:
        for layer in self._fusion_layers():
            layer.require_originals()
