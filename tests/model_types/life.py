"""The whole life of an adapter on a model type: what came of it, in a few words."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_fusion import FusionConfig
from peft_fusion.ffn import find_all, read_all

from .build import outputs, tiny


@dataclass(frozen=True)
class Life:
    """What came of a model type.

    Args:
        outcome: "works"; "adapter": merged, no checkpoint can state its widths; "refused".
        reason: why not more.
    """

    outcome: str
    reason: str = ""


def twins(model_type: str) -> nn.Module:
    """A tiny model whose FFNs have each neuron twice, so that half of their width is enough."""
    model = tiny(model_type)
    for weights in (weights for ffn in find_all(model) for weights in read_all(ffn)):
        for block in weights.blocks():  # views of the model's own
            half = len(block) // 2
            block[half:] = block[:half]
    return model


def live(model_type: str, folder: Path) -> Life:
    """Fuses a type's tiny model, trains, saves, loads, merges it and loads it without this package.

    Raises:
        AssertionError: if something on the way is not as it should be.
    """
    model = twins(model_type)
    original = result(model)
    try:
        full = get_peft_model(model, FusionConfig(ratio=1.0))
    except ValueError as error:
        assert torch.equal(result(model), original)
        return Life("refused", str(error))
    assert relative(result(full), original) < 1e-6, "full width"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fused = get_peft_model(full.unload(), FusionConfig(ratio=0.5))
    before = [str(one.message) for one in caught if "could not be exported" in str(one.message)]
    assert relative(result(fused), original) < 1e-5, "half width"
    trained = train_a_step(fused)
    fused.save_pretrained(folder / "adapter")
    loaded = PeftModel.from_pretrained(twins(model_type), folder / "adapter")
    assert torch.equal(result(loaded), trained), "adapter loaded"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = fused.merge_and_unload()
    after = [str(one.message) for one in caught if "stock transformers cannot" in str(one.message)]
    folded = result(merged)
    assert relative(folded, trained) < 1e-5, "merged"
    assert bool(before) == bool(after), "warned before the work, or not at all"
    if after:
        return Life("adapter", before[0])
    merged.save_pretrained(folder / "merged")
    stock = type(merged).from_pretrained(folder / "merged").eval()
    assert relative(result(stock), folded) < 1e-6, "loaded by transformers"  # products of other blocks of memory
    return Life("works")


def result(model: nn.Module) -> Tensor:
    """What a model puts out, without a gradient."""
    with torch.no_grad():
        return outputs(model)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def train_a_step(model: nn.Module) -> Tensor:
    """One step of Adam on the outputs' squares; returns what is put out afterwards."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    outputs(model).square().mean().backward()
    before = result(model)
    torch.optim.Adam(parameters, lr=1e-3).step()
    trained = result(model)
    assert not torch.equal(before, trained), "trained"
    return trained
