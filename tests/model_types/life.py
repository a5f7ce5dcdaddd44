"""The whole life of an adapter on a model type, and what came of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from state import changes, state_of
from torch import Tensor, nn

from peft_fusion import FusionConfig
from peft_fusion.ffn import config_widths, find_all, find_experts, list_ffns, read_all

from .build import outputs, tiny
from .sizes import NOT_COMPARED, NOT_RELOADED

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


@dataclass(frozen=True)
class Life:
    """What came of a model type.

    Args:
        outcome: one of `known.OUTCOMES`.
        layouts: the layouts of its FFNs.
        kept: the FFNs that had to keep their width, so that a checkpoint can state the others'.
        reason: why not more came of it.
    """

    outcome: str
    layouts: list[str]
    kept: list[str]
    reason: str


class Untried(Exception):
    """No tiny model of a type could be built or run."""

    @classmethod
    def of(cls, error: Exception) -> Untried:
        return cls(" ".join(f"{type(error).__name__}: {error}".split())[:160])


def live(model_type: str, folder: Path) -> Life:
    """What comes of a model type, as `_live`; what PEFT cannot do with its class, whatever the method, is not tried."""
    if model_type in NOT_COMPARED:
        raise Untried(NOT_COMPARED[model_type])
    try:
        return _live(model_type, folder)
    except NotImplementedError as error:
        raise Untried.of(error) from error


def _live(model_type: str, folder: Path) -> Life:
    """Fuses a type's tiny model, trains, saves, loads and merges it, and loads it without this package.

    Raises:
        Untried: if there is no such model.
        AssertionError: if something on the way is not as it should be.
    """
    try:
        model = twins(model_type)
    except Exception as error:
        raise Untried.of(error) from error
    check_listed(model)
    layouts, before = sorted({str(ffn.layout) for ffn in find_all(model)}), state_of(model)
    try:
        full = get_peft_model(model, FusionConfig(ratio=1.0))
    except ValueError as error:
        assert changes(before, state_of(model)) == []
        return Life("refused" if layouts else "none", layouts, [], str(error))
    try:
        found = result(full)
    except Exception as error:
        raise Untried.of(error) from error
    model = full.unload()
    original = result(model)
    if not original.any():
        raise Untried("it puts out zeros")
    assert relative(found, original) < 1e-6, "full width"
    fused, warned = half(model)
    assert relative(result(fused), original) < 1e-5, "half width"
    trained = train_a_step(fused)
    fused.save_pretrained(folder / "adapter")
    loaded = PeftModel.from_pretrained(twins(model_type), folder / "adapter")
    check_equal(loaded, fused, trained)
    if not warned:
        limit = NOT_RELOADED.get(model_type, "")
        assert is_reloaded(fused, trained, folder) == (not limit), "loaded by transformers"
        return Life("adapter" if limit else "works", layouts, [], limit)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert relative(result(fused.merge_and_unload()), trained) < 1e-5, "merged"
    assert any("stock transformers cannot" in str(one.message) for one in caught), "warned before and after"
    return without(twins(model_type), layouts, warned, folder)


def without(model: nn.Module, layouts: list[str], warned: str, folder: Path) -> Life:
    """What comes of a model whose widths no checkpoint can state, if those FFNs are left out, as it was told."""
    ffns = find_all(model)
    places = config_widths(model, ffns, {ffn.name: ffn.width // 2 for ffn in ffns})
    kept = [name for name, place in places.items() if not place.states_it]
    if len(kept) == len(ffns):
        return Life("adapter", layouts, [], warned)
    fused, warned_again = half(model, kept)
    assert kept and not warned_again
    assert is_reloaded(fused, result(fused), folder), "loaded by transformers"
    return Life("works", layouts, kept, warned)


def half(model: nn.Module, kept: Sequence[str] = ()) -> tuple[PeftModel, str]:
    """A model with its FFNs at half width, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fused = get_peft_model(model, FusionConfig(ratio=0.5, exclude_modules=list(kept) or None))
    told = [str(one.message) for one in caught if "could not be exported" in str(one.message)]
    return fused, next(iter(told), "")


def is_reloaded(fused: PeftModel, trained: Tensor, folder: Path) -> bool:
    """Whether the merged model, which gives what the adapter gave, is loaded by transformers without this package."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stock transformers cannot.*")
        merged = fused.merge_and_unload()
    folded = result(merged)
    assert relative(folded, trained) < 1e-5, "merged"
    merged.save_pretrained(folder / "merged")
    stock = type(merged).from_pretrained(folder / "merged").eval()
    return relative(result(stock), folded) < 1e-6  # weights lie elsewhere in memory


def check_listed(model: nn.Module) -> None:
    """What is listed of a model's FFNs is what they hold."""
    rows = {row["name"]: row for row in list_ffns(model)}
    for ffn in find_all(model):
        held = {id(p): p.numel() for module in ffn.base_projections for p in module.parameters(recurse=False)}
        assert (rows[ffn.name]["width"], rows[ffn.name]["parameters"]) == (ffn.width, sum(held.values())), "listed"


def check_equal(loaded: PeftModel, fused: PeftModel, trained: Tensor) -> None:
    """A loaded adapter has the saved one's weights, bit by bit, and experts give the same in every implementation."""
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in fused.state_dict().items()), "adapter loaded"
    assert relative(result(loaded), trained) < 1e-6, "adapter loaded"  # weights lie elsewhere in memory
    host = loaded.get_base_model()
    several = find_experts(fused.get_base_model()) and type(host)._can_set_experts_implementation()
    for implementation in IMPLEMENTATIONS if several else ():
        host.set_experts_implementation(implementation)
        assert relative(result(loaded), trained) < 1e-5, implementation


def twins(model_type: str) -> nn.Module:
    """A tiny model whose FFNs have each neuron twice, so that half of their width is enough."""
    model = tiny(model_type)
    for weights in (weights for ffn in find_all(model) for weights in read_all(ffn)):
        for block in weights.blocks():  # views of the model's own
            middle = len(block) // 2
            block[middle:] = block[:middle]
    return model


def result(model: nn.Module) -> Tensor:
    """What a model puts out, without a gradient."""
    with torch.no_grad():
        return outputs(model)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def train_a_step(model: nn.Module) -> Tensor:
    """One step of Adam on the outputs' squares; returns what is put out afterwards."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = outputs(model)
    before.pow(2).mean().backward()
    torch.optim.Adam(parameters, lr=1e-2).step()
    trained = result(model)
    assert not torch.equal(before, trained), "trained"
    return trained
