"""`showing`: the original or the narrow side of a model for a while, with all of its state as it was."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from architectures import BY_NAME
from helpers import half, logits
from peft import PeftModel, get_peft_model

from peft_fusion.tuner.layer import FusionLayer
from peft_fusion.tuner.showing import showing

LLAMA = BY_NAME["llama"]


def layers_of(model: torch.nn.Module) -> list[FusionLayer]:
    return [module for module in model.modules() if isinstance(module, FusionLayer)]


def fused(**settings) -> tuple[PeftModel, torch.Tensor, torch.Tensor]:
    """A fused model, the original's logits and its own."""
    model = LLAMA.make()
    original = logits(model, LLAMA)
    model = get_peft_model(model, half(LLAMA, **settings))
    return model, original, logits(model, LLAMA)


def state(model: torch.nn.Module) -> dict:
    """Everything that must be as it was, by identity where it has one."""
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "parameters": {n: (p.data_ptr(), p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()},
        "layers": [
            (
                list(layer.merged_adapters),
                [id(wide) for wide in layer._wide],
                layer.disable_adapters,
                list(layer.active_adapters),
                layer._shown,
            )
            for layer in layers_of(model)
        ],
    }


@pytest.mark.parametrize("base_weights", ["keep", "offload"])
@pytest.mark.parametrize("situation", ["plain", "merged", "disabled", "none active"])
def test_either_side_is_shown_and_nothing_else_changes(situation, base_weights):
    model, original, narrow = fused(base_weights=base_weights)
    if situation == "merged":
        model.merge_adapter()
    if situation == "none active":
        model.delete_adapter("default")
    with model.disable_adapter() if situation == "disabled" else nullcontext():
        before, shown = state(model), logits(model.base_model, LLAMA)
        with showing(layers_of(model), originals=True):
            assert torch.equal(logits(model.base_model, LLAMA), original)
            with showing(layers_of(model), originals=False):
                assert torch.equal(logits(model.base_model, LLAMA), original if situation == "none active" else narrow)
            assert torch.equal(logits(model.base_model, LLAMA), original)
        if base_weights == "keep":
            assert state(model) == before
        assert state(model)["layers"] == before["layers"]
        assert torch.equal(logits(model.base_model, LLAMA), shown)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("merged", [False, True])
def test_offloaded_originals_leave_again_after_an_interrupt(interrupt, merged):
    model, original, _ = fused(base_weights="offload")
    if merged:
        model.merge_adapter()
    shown = logits(model, LLAMA)
    with pytest.raises(interrupt), showing(layers_of(model), originals=True):
        assert all(p.numel() for layer in layers_of(model) for p in layer.original_layer.parameters())
        raise interrupt
    assert not any(p.numel() for layer in layers_of(model) for p in layer.original_layer.parameters())
    assert torch.equal(logits(model, LLAMA), shown)
    with showing(layers_of(model), originals=True):
        assert torch.equal(logits(model, LLAMA), original)


def test_an_interrupt_while_originals_come_back(monkeypatch):
    model, _, narrow = fused(base_weights="offload")
    layers = layers_of(model)
    monkeypatch.setattr(layers[4], "follow", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), showing(layers, originals=True):
        raise AssertionError("not reached")
    assert not any(p.numel() for layer in layers for p in layer.original_layer.parameters())
    assert torch.equal(logits(model, LLAMA), narrow)


def test_dropped_originals_are_refused_before_anything_changes(monkeypatch):
    model, _, narrow = fused(base_weights="discard")
    before = state(model)
    with monkeypatch.context() as patch:
        patch.setattr(FusionLayer, "follow", lambda layer: pytest.fail("a layer was touched"))
        with pytest.raises(RuntimeError, match="were dropped"), showing(layers_of(model), originals=True):
            pass
    assert state(model) == before
    model.merge_adapter()
    with showing(layers_of(model), originals=False):
        assert torch.equal(logits(model, LLAMA), narrow)


def test_a_merged_model_that_was_cast_shows_its_original_in_that_precision():
    model, _, _ = fused()
    model.merge_adapter()
    model.to(torch.bfloat16)
    with showing(layers_of(model), originals=True):
        assert torch.equal(logits(model, LLAMA), logits(LLAMA.make().to(torch.bfloat16), LLAMA))


def test_both_sides_compile_to_one_graph():
    model, original, narrow = fused()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for originals, expected in ((True, original), (False, narrow), (True, original)):
            with showing(layers_of(model), originals):
                torch.testing.assert_close(compiled(**LLAMA.batch()).logits, expected)
        torch.testing.assert_close(compiled(**LLAMA.batch()).logits, narrow)
    torch._dynamo.reset()
