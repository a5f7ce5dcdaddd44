"""An adapter's tensors: which they are, and whether a file's fit a model, before anything in the model changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from ..fusing.recipe import Recipe
from .config import FusionConfig
from .layer import FusionLayer
from .narrow import NarrowProjection
from .plan import PlannedFFN

WEIGHTS_FILE = "adapter_model.safetensors"


def check_checkpoint(model: nn.Module, config: FusionConfig, plan: Sequence[PlannedFFN], recipe: Recipe) -> None:
    """Refuses an adapter's file that is damaged or does not fit; reads its header only.

    Args:
        model: the model the adapter is to be loaded on, unchanged.
        config: the adapter's configuration; nothing is checked unless it was read from a folder or the Hub.
        plan: what the adapter does to the model.
        recipe: how its narrow FFNs were made.

    Raises:
        ValueError: if the file is truncated, a tensor is missing, or one has another shape than the model needs.
    """
    source = getattr(config, "_loaded_from", None)
    if not config.fused or source is None:
        return
    file = cached_file(
        str(source[0]), WEIGHTS_FILE, subfolder=source[1] or "", _raise_exceptions_for_missing_entries=False
    )
    if file is None:  # an adapter in another format: PEFT opens it or says why not
        return
    found = _shapes_in(file)
    for name, shape in _expected(model, config, plan, recipe).items():
        if name not in found:
            raise ValueError(
                f"The adapter file {file} lacks the tensor {name!r} of shape {shape}. It is damaged, or belongs "
                "to another model."
            )
        if found[name] != shape:
            raise ValueError(
                f"The adapter file {file} holds {name!r} of shape {found[name]}, but this model needs {shape}. "
                "Load it on the model it was made for."
            )


def _shapes_in(file: str) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a safetensors file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"The adapter file {file} is damaged or incomplete: {error}. Copy it again.") from error


def _expected(
    model: nn.Module, config: FusionConfig, plan: Sequence[PlannedFFN], recipe: Recipe
) -> dict[str, tuple[int, ...]]:
    """Every tensor that an adapter's file must hold, under its name there, with its shape."""
    expected = {}
    for planned in plan:
        for name, shape in planned.shapes(recipe).items():
            module, _, kind = name.rpartition(".")
            expected[f"base_model.model.{module}.mlp_fusion_narrow.{kind}"] = shape
    for name, parameter in model.named_parameters():
        if any(f".{part}." in f".{name}" for part in config.modules_to_save or ()):
            expected[f"base_model.model.{name.replace('.original_module', '')}"] = tuple(parameter.shape)
    return {name: shape for name, shape in expected.items() if ".modules_to_save." not in name}


def narrow_state_dict(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter's narrow projections, under the names they have in the model's state dict.

    Args:
        model: the model, wrapped by PEFT or not.
        adapter_name: the adapter.
        state_dict: the model's, gathered where it is sharded; what it lacks is taken from the model.
    """
    found: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, FusionLayer) or adapter_name not in layer.mlp_fusion_narrow:
            continue
        prefix = f"{name}.mlp_fusion_narrow.{adapter_name}.".replace("_fsdp_wrapped_module.", "")
        found.update((key, tensor) for key, tensor in state_dict.items() if key.startswith(prefix))
        narrow = layer.mlp_fusion_narrow[adapter_name]
        if isinstance(narrow, NarrowProjection):
            for kind, tensor in [*narrow.named_parameters(), *narrow.named_buffers()]:
                found.setdefault(prefix + kind, tensor.detach())
    return found
