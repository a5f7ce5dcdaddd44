"""The original and the fused network side by side, out of one model or out of two."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..ffn import AnyFFN, find_all
from .networks import Network, carries_adapter, fusion_layers
from .unwrap import unwrapped


def pair(model: nn.Module, reference: nn.Module | None, each_ffn: bool = True) -> tuple[Network, Network]:
    """The original and the fused network, with the FFNs that differ matched by name.

    Args:
        model: a model with a fusion adapter, or one that was made narrow for good.
        reference: the original; None: the same model with its original FFNs.
        each_ffn: whether FFNs are looked at one by one, and not the networks as wholes alone.

    Returns:
        The original, then the fused one.

    Raises:
        ValueError: if there is no original to compare with, an adapter is merged, or FFNs are missing in one of them.
        RuntimeError: if the original weights were dropped and there is no reference.
    """
    model = unwrapped(model)
    if any(layer.merged for layer in fusion_layers(model)):
        raise ValueError(
            "The fusion adapter is merged, so that its narrow FFNs are not in place. Call `unmerge_adapter()` first."
        )
    fused = [ffn for ffn in find_all(model) if carries_adapter(ffn)]
    if reference is None:
        if not fused:
            raise ValueError(
                f"{type(model).__name__} has no active fusion adapter, so there is no original to compare it with. "
                "Give the original model as `reference`."
            )
        for layer in fusion_layers(model):
            layer.require_originals()
        return Network(model, fused, False), Network(model, fused, True)
    reference = unwrapped(reference)
    originals = {ffn.name: ffn for ffn in find_all(reference)}
    fused = fused or _of_other_width(find_all(model), originals)
    missing = [ffn.name for ffn in fused if ffn.name not in originals]
    if missing or (each_ffn and not fused):
        raise ValueError(
            f"The reference ({type(reference).__name__}) has no FFN named {missing[0] if missing else 'as the model'}; "
            f"it has {sorted(originals)[:4]}. Give the model that was fused."
        )
    return Network(reference, [originals[ffn.name] for ffn in fused], False), Network(model, fused, True)


def _of_other_width(ffns: list[AnyFFN], originals: Mapping[str, AnyFFN]) -> list[AnyFFN]:
    """The FFNs whose width is not the original one's; all of them if there is none."""
    narrow = [ffn for ffn in ffns if ffn.name in originals and originals[ffn.name].width != ffn.width]
    return narrow or ffns
