"""The layer that stands in for one projection of a fused FFN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..ffn import ConfigWidth, fetching_hook, is_quantised, keep_away, offload, require_originals, restore
from .narrow import Narrow, NarrowProjection, plain_projection
from .narrow import NarrowInProjection as NarrowInProjection
from .narrow import NarrowOutProjection as NarrowOutProjection


class FusionLayer(nn.Module, BaseTunerLayer):
    """One projection of an FFN beneath any number of narrow versions of itself, one an adapter.

    All projections of an FFN carry the same adapters, so the hidden activations between them are those of one
    width; the host's own forward (activation, dropout, chunking) runs unchanged.

    Args:
        base_layer: the projection, an `nn.Linear` or a `Conv1D`.
        dtype: the model's, for the plain projection that a quantised one is merged to.
    """

    adapter_layer_names: tuple[str, ...] = ("mlp_fusion_narrow",)
    other_param_names: tuple[str, ...] = ("config_widths",)

    def __init__(self, base_layer: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        keep_away(base_layer, beneath=True)
        self._dtype = dtype
        self.mlp_fusion_narrow = nn.ModuleDict()
        self.config_widths: dict[str, ConfigWidth] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._wide: list[nn.Module] = []  # the original while merged; in a list, for it is not a submodule
        self._offloads = False
        self._shown: bool | None = None  # see `showing`

    def add_narrow(self, adapter_name: str, narrow: Narrow, width: ConfigWidth | None) -> None:
        """Adds an adapter's version of this projection.

        Args:
            adapter_name: the adapter.
            narrow: its narrow projection.
            width: where the config states the FFN's width, on the out-projection; None on the others.
        """
        self.mlp_fusion_narrow[adapter_name] = narrow
        if width is not None:
            self.config_widths[adapter_name] = width
        active: list[str] = list(self.active_adapters)  # type: ignore[arg-type]
        self.set_adapter(active)

    def set_aside(self, keep: bool) -> None:
        """Takes the original weights out of the layer, to CPU memory (`keep`) or for good."""
        self._offloads = keep
        offload(self.base_layer, keep)

    @property
    def original_layer(self) -> nn.Module:
        """The original projection, which is set aside while an adapter is merged."""
        return self._wide[-1] if self.merged else self.base_layer

    def require_originals(self) -> None:
        """Refuses what needs the original weights before anything is changed.

        Raises:
            RuntimeError: if they were dropped.
        """
        require_originals(self.original_layer)

    def enable_adapters(self, enabled: bool) -> None:
        """Turns the narrow projections on or off; off needs the original weights.

        Raises:
            RuntimeError: if they were dropped.
        """
        if not enabled:
            restore(self.original_layer)
            self.unmerge()
        super().enable_adapters(enabled)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Sets the active adapters; at most one of them may be a narrow version of this projection.

        Raises:
            ValueError: if two would be.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        active = [name for name in names if name in self.mlp_fusion_narrow]
        check_one_active(active)
        super().set_adapter(names, inference_mode=inference_mode)
        if active and self._offloads and not self.merged:
            offload(self.base_layer, keep=True)

    def check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Refuses what `merge` would refuse, and changes nothing.

        Args:
            safe_merge: see `merge`.
            adapter_names: see `merge`.

        Raises:
            ValueError: if there are NaNs under `safe_merge`, or two adapters to merge.
        """
        wanted: list[str] = self.active_adapters if adapter_names is None else adapter_names  # type: ignore[assignment]
        names = [n for n in wanted if n in self.mlp_fusion_narrow and n not in self.merged_adapters]
        check_one_active([*self.merged_adapters, *names])
        for name in names if safe_merge else ():
            if not all(bool(torch.isfinite(tensor).all()) for tensor in self._folded(name)):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the plain narrow projection, scale folded in, in the place of the original, which is kept.

        Args:
            safe_merge: whether to refuse a projection that holds NaN.
            adapter_names: the adapter to merge, in a list; None for the active one.

        Raises:
            ValueError: if there are NaNs under `safe_merge`, or two adapters to merge.
        """
        self.check_merge(safe_merge, adapter_names)
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.mlp_fusion_narrow]
        if not names:
            return
        wide = self.base_layer
        self.base_layer = self.plain(names[0])
        self._wide.append(wide)
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        """Puts the original projection back."""
        if not self.merged:
            return
        self.follow()
        self.base_layer = self._wide.pop()
        self.merged_adapters.clear()

    def follow(self) -> None:
        """Takes an original that is set aside to where, and into the precision in which, the model is by now."""
        if self.merged and fetching_hook(self._wide[-1]) is None:
            now, wide = next(self.base_layer.parameters()), self._wide[-1]
            wide.to(now.device, None if is_quantised(wide) else now.dtype)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The plain module that takes this layer's place for good; called by PEFT's tuners, LoRA's included.

        Args:
            merge: whether that is the narrow projection (the config's width then follows) or the original.
            safe_merge: see `merge`.
            adapter_names: see `merge`.
        """
        if not merge:
            self.unmerge()
            restore(self.base_layer)
            keep_away(self.base_layer, beneath=False)
            return self.base_layer
        self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        for name in self.merged_adapters:
            if name in self.config_widths:
                self.config_widths[name].apply()
        return self.base_layer

    @property
    def active_narrow(self) -> nn.Module | None:
        """The narrow projection of the active adapter, whether it is merged or disabled or not; None without one.

        FSDP may have wrapped it.
        """
        for name in self.active_adapters:  # type: ignore[union-attr]
            if name in self.mlp_fusion_narrow:
                return self.mlp_fusion_narrow[name]
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Maps (..., in_features) to (..., out_features) of the original or of the active narrow projection."""
        narrow = self.computing_narrow()
        output: Tensor = self.computing_original()(x, *args, **kwargs) if narrow is None else narrow(x)
        return output

    def computing_narrow(self) -> nn.Module | None:
        """The narrow module that computes; None where the original does, or what it was merged to."""
        original = self.disable_adapters or self.merged if self._shown is None else self._shown
        return None if original else self.active_narrow

    def computing_original(self) -> nn.Module:
        """The plain module that computes where no narrow one does, with its weights in it."""
        base = self.base_layer if self._shown is None else self.original_layer
        restore(base)
        return base

    def plain(self, adapter_name: str) -> nn.Module:
        """The plain module that an adapter is merged to."""
        weight, bias = self._narrow(adapter_name).folded()
        return plain_projection(self.base_layer, weight.detach(), None if bias is None else bias.detach(), self._dtype)

    def __repr__(self) -> str:
        return "mlp_fusion." + super().__repr__()

    def _folded(self, adapter_name: str) -> list[Tensor]:
        """The tensors of the plain module that an adapter is merged to."""
        return [tensor for tensor in self._narrow(adapter_name).folded() if tensor is not None]

    def _narrow(self, adapter_name: str) -> NarrowProjection:
        narrow = self.mlp_fusion_narrow[adapter_name]
        assert isinstance(narrow, NarrowProjection)
        return narrow


def check_one_active(names: Sequence[str]) -> None:
    """Refuses two narrow versions of one FFN at once.

    Raises:
        ValueError: if there is more than one name.
    """
    if len(names) > 1:
        raise ValueError(
            f"The fusion adapters {list(names)} cannot be active or merged together: an FFN is replaced by one narrow "
            "FFN, and two of them do not add up to a third. Choose one with `set_adapter`."
        )
