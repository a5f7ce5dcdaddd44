"""`FusionModel`, the tuner: it plans, has the narrow weights made, and puts the layers in place."""

from __future__ import annotations

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from torch import Tensor, nn

from .config import FusionConfig
from .experts import ExpertsLayer, NarrowExperts
from .guarded import GuardedTuner
from .handover import drop_calibrated
from .layer import FusionLayer
from .loading import tensors_to_come
from .make import made_anew, to_load
from .names import check_name, forget_refused_adapter
from .narrow import Narrow
from .plan import AnyPlanned
from .state import keys_to_load, narrow_state_dict, recorded_scale
from .stored import in_state_dict
from .transaction import all_or_nothing


class FusionModel(GuardedTuner):
    """Replaces the FFNs of a model by narrow ones, whose neurons are clusters of the original neurons.

    Everything that can be refused is refused, and all narrow weights are made, before the first module of the
    model is replaced: a call that fails leaves the model as it was.

    Args:
        model: the model whose FFNs are fused, in place.
        peft_config: the configuration, or adapter name -> configuration.
        adapter_name: the adapter's name.

    Raises:
        ValueError: if the model already has an adapter of that name, or the configuration does not fit it.
    """

    prefix: str = "mlp_fusion_"
    tuner_layer_cls = FusionLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        held = getattr(model, "peft_config", None) or {}
        before = dict(held)
        try:
            check_name(adapter_name, held)
            super().__init__(
                model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict
            )
        except BaseException:
            held.clear()  # the tuners of one model share this dictionary
            held.update(before)
            forget_refused_adapter(model)
            raise

    @classmethod
    def over(cls, tuner: BaseTuner) -> FusionModel:
        """A fusion tuner for the model, the configurations and the active adapters of another tuner."""
        fusion = cls.__new__(cls)
        nn.Module.__init__(fusion)
        fusion.model, fusion.peft_config = tuner.model, tuner.peft_config
        fusion.active_adapter = tuner.active_adapter
        fusion.targeted_module_names, fusion.targeted_parameter_names = [], []
        return fusion

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Plans, makes the narrow weights and only then changes the model; see `BaseTuner.inject_adapter`."""
        check_name(adapter_name)
        self._stored = tensors_to_come(model, adapter_name) if state_dict is None else in_state_dict(state_dict)
        self._on_meta = low_cpu_mem_usage or _made_on_meta()
        self._projections: dict[str, tuple[Narrow, AnyPlanned]] = {}
        config = self.peft_config[adapter_name]
        try:
            with all_or_nothing(self.model, config):
                super().inject_adapter(
                    model,
                    adapter_name,
                    autocast_adapter_dtype=autocast_adapter_dtype,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                )
                self._set_aside(adapter_name, config.base_weights)
        except BaseException:
            self.peft_config.pop(adapter_name, None)  # PEFT's own functions do so after errors, not after interrupts
            raise
        finally:
            self._projections, self._stored = {}, None
        if config.fused_by and config.fused_by["calibration"]:
            drop_calibrated(self.model)

    def _set_aside(self, adapter_name: str, base_weights: str) -> None:
        """Takes the original weights of an adapter's FFNs out of the way, as its configuration wants it."""
        for layer in self._fusion_layers() if base_weights != "keep" else ():
            if adapter_name in layer.mlp_fusion_narrow:
                layer.set_aside(keep=base_weights == "offload")

    def unload(self) -> nn.Module:
        """Gives the original model back; see `BaseTuner.unload`.

        Raises:
            RuntimeError: if the original weights were dropped.
        """
        self._require_originals()
        return super().unload()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(safe_merge, adapter_names)
        with all_or_nothing(self.model):
            return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Selects by structure; PEFT has dropped by name, so that an adapter called "mlp" hides another's tensors."""
        if config.fused_by is not None:  # what was loaded since may have other scales
            config.fused_by = {**config.fused_by, "scale": recorded_scale(model, adapter_name)}
        return narrow_state_dict(model, adapter_name, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Maps by structure what fits; PEFT knows no place for a scale that the model does not have yet."""
        return keys_to_load(model, adapter_name, state_dict)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        """`target_modules=None` stays: it means every FFN that is found."""
        return peft_config

    def _prepare_model(self, peft_config: FusionConfig, model: nn.Module) -> None:
        """Makes every narrow projection of the adapter; nothing in the model has been changed up to here."""
        loads = self._stored is not None or self._on_meta
        made = to_load(model, peft_config, self._stored) if loads else made_anew(model, peft_config)
        for planned, projections in made:
            for name, projection in zip(planned.ffn.projection_names, projections, strict=True):
                self._projections[name] = (projection, planned)

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool | _ExcludedModule:
        if key not in self._projections and peft_config.exclude_modules:
            return _ExcludedModule()  # else PEFT warns that nothing was excluded
        return key in self._projections

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        projection, planned = self._projections[current_key]
        is_out = current_key == planned.ffn.projection_names[-1]
        if _made_on_meta():
            projection.to("meta")
        kind = ExpertsLayer if isinstance(projection, NarrowExperts) else FusionLayer
        layer = target if isinstance(target, FusionLayer) else kind(target, getattr(self.model, "dtype", None))
        layer.add_narrow(adapter_name, projection, planned.config_width if is_out else None)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """The narrow projections are made on the right device, and a plain module needs nothing of the old one."""
        setattr(parent, child_name, new_module)


def _made_on_meta() -> bool:
    """Whether parameters made now have no memory, as under accelerate's `init_empty_weights`; draws no number."""
    return nn.LayerNorm(1).weight.is_meta
