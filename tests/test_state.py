"""`unchanged` sees whatever a call can leave behind."""

from __future__ import annotations

import pytest
import torch
from architectures import BY_NAME
from helpers import half
from peft import get_peft_model
from state import HANDED_OVER, changes, state_of
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from peft_fusion.observe.networks import fusion_layers

LLAMA = BY_NAME["llama"]


def nothing(*_):
    return None


def first(model: nn.Module) -> nn.Parameter:
    return next(model.parameters())


def layer(model: nn.Module):
    return fusion_layers(model)[0]


def swap(model: nn.Module) -> None:
    norm = model.base_model.model.model.norm
    norm.weight = nn.Parameter(norm.weight.detach().clone(), requires_grad=norm.weight.requires_grad)


def give_gradient(model: nn.Module) -> None:
    first(model).grad = torch.zeros_like(first(model))


TRACES = {
    "a value": lambda m: first(m).data[0].add_(1),
    "a zero's sign": lambda m: first(m).data[0, 0].mul_(-1),
    "a dtype": lambda m: m.base_model.model.model.norm.to(torch.bfloat16),
    "a device": lambda m: m.base_model.model.model.norm.to("meta"),
    "a parameter's identity": swap,
    "a buffer that is not saved": lambda m: m.base_model.model.model.rotary_emb.inv_freq.mul_(2),
    "requires_grad": lambda m: first(m).requires_grad_(True),
    "a gradient": give_gradient,
    "a gradient's value": lambda m: layer(m).mlp_fusion_narrow["default"].weight.grad.add_(1),
    "a submodule's mode": lambda m: layer(m).eval(),
    "a forward hook": lambda m: layer(m).register_forward_hook(nothing),
    "a forward pre-hook": lambda m: layer(m).register_forward_pre_hook(nothing, with_kwargs=True),
    "a backward hook": lambda m: layer(m).register_full_backward_hook(nothing),
    "a hook on the state dict": lambda m: layer(m).register_state_dict_pre_hook(nothing),
    "a tensor's hook": lambda m: layer(m).mlp_fusion_narrow["default"].weight.register_hook(nothing),
    "a hook on every module": lambda m: register_module_forward_hook(nothing),
    "a merge": lambda m: m.merge_adapter(),
    "a merge of one layer": lambda m: layer(m).merge(),
    "a disabled adapter": lambda m: layer(m).enable_adapters(False),
    "an adapter's name": lambda m: layer(m)._active_adapter.append("other"),
    "a setting of the adapter": lambda m: setattr(m.peft_config["default"], "ratio", 0.1),
    "a configuration": lambda m: m.peft_config.update(other=None),
    "a note of transformers'": lambda m: setattr(m.base_model.model, "_hf_peft_config_loaded", True),
    "the width": lambda m: setattr(m.base_model.model.config, "intermediate_size", 32),
    "a setting of generation": lambda m: setattr(m.base_model.model.generation_config, "do_sample", True),
    "an attribute": lambda m: setattr(m.base_model.model, "left_behind", nothing),
    "a method": lambda m: setattr(layer(m), "forward", nothing),
    "a calibration": lambda m: setattr(m.base_model.model, HANDED_OVER, nothing),
    "a module": lambda m: m.base_model.model.add_module("more", nn.ReLU()),
    "a module's identity": lambda m: setattr(m.base_model.model.model, "norm", nn.Identity()),
    "random numbers": lambda m: torch.rand(1),
    "the default dtype": lambda m: torch.set_default_dtype(torch.float64),
    "whether gradients are taken": lambda m: torch.set_grad_enabled(False),
}


@pytest.fixture
def model():
    """A fused model in training, with gradients."""
    model = get_peft_model(LLAMA.make(), half(LLAMA)).train()
    first(model).data[0, 0] = 0
    model(**LLAMA.batch(labels=True)).loss.backward()
    yield model
    nn.modules.module._global_forward_hooks.clear()
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("trace", TRACES)
def test_every_trace_is_seen(trace, model):
    before = state_of(model)
    TRACES[trace](model)
    assert changes(before, state_of(model))


def test_running_a_model_leaves_no_trace(model):
    """Other than attributes that say what their class says already, as transformers sets them."""
    before = state_of(model)
    with torch.no_grad():
        model(**LLAMA.batch())
    model.base_model.model._hf_peft_config_loaded = False
    assert changes(before, state_of(model)) == []


def test_a_calibration_may_be_left(model):
    before = state_of(model)
    setattr(model.base_model.model, HANDED_OVER, nothing)
    assert changes(before, state_of(model), f".{HANDED_OVER}") == []


def test_disappeared_attributes_are_named(model):
    before = state_of(model)
    del model.base_model.model.generation_config
    assert changes(before, state_of(model)) == ["base_model.model.generation_config disappeared"]
