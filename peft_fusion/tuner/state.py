"""The tensors of the adapters that a model has: what is saved of them, and what may be loaded into them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .checkpoint import scale_name, shapes_to_save
from .config import FusionConfig
from .layer import FusionLayer
from .narrow import Narrow
from .stored import MARK, PREFIX, SCALES, StoredTensors, in_state_dict


def narrow_state_dict(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter's narrow projections, under the names they have in the model's state dict.

    Args:
        model: the model, wrapped by PEFT or not.
        adapter_name: the adapter.
        state_dict: the model's, gathered where it is sharded; what it lacks is taken from the model.
    """
    found: dict[str, Tensor] = {}
    for name, layer in _layers(model, adapter_name).items():
        prefix = f"{name}{MARK}{adapter_name}."
        found.update((key, tensor) for key, tensor in state_dict.items() if key.startswith(prefix))
        narrow = layer.mlp_fusion_narrow[adapter_name]
        if isinstance(narrow, Narrow):
            for kind, tensor in [*narrow.named_parameters(), *narrow.named_buffers()]:
                found.setdefault(prefix + kind, tensor.detach())
    return found


def recorded_scale(model: nn.Module, adapter_name: str) -> str:
    """What a recipe calls the scales that an adapter has by now: "counts", "ntk" or "none"."""
    projections = _projections(model, adapter_name).values()
    return scale_name({is_out for projection in projections for is_out in projection.scaled})


def keys_to_load(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's stored tensors under the names they have in the model's state dict, if they fit.

    Args:
        model: the model, wrapped by PEFT or not.
        adapter_name: the adapter.
        state_dict: the stored tensors, by names without an adapter's; what is not narrow is passed on.

    Raises:
        ValueError: if some of the adapter's tensors are missing or do not fit; nothing has been loaded then.
    """
    check_fits(model, adapter_name, in_state_dict(state_dict))
    names = {_bare(name): name for name in _layers(model, adapter_name)}
    keys = {}
    for key in state_dict:
        projection, _, kind = _bare(key).partition(MARK)
        keys[key] = f"{names[projection]}{MARK}{adapter_name}.{kind}" if projection in names and kind else key
    return {keys[key]: tensor for key, tensor in state_dict.items()}


def check_fits(model: nn.Module, adapter_name: str, stored: StoredTensors, config: FusionConfig | None = None) -> None:
    """Refuses stored tensors that are not those of an adapter which a model has.

    Args:
        model: the model, wrapped by PEFT or not.
        adapter_name: the adapter.
        stored: the tensors; none of them narrow is as good as all, for ranks that load nothing.
        config: the adapter's configuration, if the modules that it trains in full are to be checked, too.

    Raises:
        ValueError: naming the tensor, what was found and what is needed.
    """
    narrow = stored.narrow()
    if narrow:
        needed = {_bare(name): dict(p.shapes) for name, p in _projections(model, adapter_name).items()}
        for name, kinds in needed.items():
            for kind in SCALES & (kinds.keys() - narrow.get(name, {}).keys()):
                kinds.pop(kind)
        stored.check_narrow(needed)
    if config is not None:
        modules = {_bare(name): shape for name, shape in shapes_to_save(model, config).items()}
        stored.check(modules, stored.mismatched_modules)


def unfilled(model: nn.Module, adapter_name: str) -> str | None:
    """The name of a narrow tensor that nothing was loaded into, if there is one."""
    for name, projection in _projections(model, adapter_name).items():
        for kind, tensor in [*projection.named_parameters(), *projection.named_buffers()]:
            if tensor.is_meta or (tensor.numel() and bool(tensor.flatten()[0].isnan()) and bool(tensor.isnan().all())):
                return f"{_bare(name)}{MARK}{kind}"
    return None


def _layers(model: nn.Module, adapter_name: str) -> dict[str, FusionLayer]:
    """The layers that have an adapter, by their names in the state dict of the model."""
    return {
        name.replace("_fsdp_wrapped_module.", ""): module
        for name, module in model.named_modules()
        if isinstance(module, FusionLayer) and adapter_name in module.mlp_fusion_narrow
    }


def _projections(model: nn.Module, adapter_name: str) -> dict[str, Narrow]:
    """An adapter's projections beneath any wrapper, by the names of their layers."""
    found = {}
    for name, layer in _layers(model, adapter_name).items():
        narrow = layer.mlp_fusion_narrow[adapter_name]
        narrow = getattr(narrow, "_fsdp_wrapped_module", narrow)
        assert isinstance(narrow, Narrow)
        found[name] = narrow
    return found


def _bare(name: str) -> str:
    """A name within the model itself, without what wraps it."""
    return name.replace("_orig_mod.", "").removeprefix(PREFIX)
