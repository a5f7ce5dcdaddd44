"""Routed experts: found by flags and shapes, read as rows of neurons, written back, and refused where they do more."""

from __future__ import annotations

import pytest
import torch
from moes import GPT_OSS, LLAMA4, MIXTRAL, MOES, NEMOTRON_H
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from peft_fusion import FusionConfig
from peft_fusion.ffn import check_experts, experts_like, experts_tensors, find_all, find_experts, read_experts
from peft_fusion.ffn.experts import hidden_activations

every = pytest.mark.parametrize("moe", MOES, ids=lambda a: a.name)


def by_hand(experts, index: int, x: Tensor) -> Tensor:
    """What one expert puts out, from its rows."""
    weights = read_experts(experts)[index]
    ins = [x @ w.T + (0 if b is None else b) for w, b in zip(weights.in_weights, weights.in_biases, strict=True)]
    if experts.homogeneity == 0:  # gpt-oss
        gate, up = ins[0].clamp(max=7.0), ins[1].clamp(-7.0, 7.0)
        hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    else:
        hidden = experts.activation(ins[0]) * (ins[1] if weights.gated else 1)
    return hidden @ weights.out_weight + (0 if weights.out_bias is None else weights.out_bias)


@every
def test_rows_compute_what_the_module_computes(moe):
    for experts in find_experts(moe.make()):
        x = torch.randn(4 * experts.count, experts.in_dim)
        if moe is LLAMA4:
            expected = torch.cat([by_hand(experts, i, part) for i, part in enumerate(x.chunk(experts.count))])
            found = experts.module(x)
        else:
            index = torch.arange(len(x)).remainder(experts.count).view(-1, 1)
            expected = torch.stack(
                [by_hand(experts, i, row) for i, row in zip(index.flatten().tolist(), x, strict=True)]
            )
            found = experts.module(x, index, torch.ones(len(x), 1))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every
def test_reading_copies_nothing_and_writing_inverts_it(moe):
    for experts in find_experts(moe.make()):
        weights = read_experts(experts)
        storages = {p.untyped_storage().data_ptr() for p in experts.module.parameters(recurse=False)}
        assert len(weights) == experts.count and {w.width for w in weights} == {experts.width}
        assert all(block.untyped_storage().data_ptr() in storages for w in weights for block in w.blocks())
        written = experts_tensors(weights, experts.layout)
        assert written.keys() == dict(experts.module.named_parameters(recurse=False)).keys()
        assert all(torch.equal(tensor, getattr(experts.module, name)) for name, tensor in written.items())


def test_layouts_are_told_by_flags_and_shapes():
    layouts = {moe.name: find_experts(moe.make())[0].layout for moe in MOES}
    assert [name for name, layout in layouts.items() if layout.transposed] == ["gpt_oss", "llama4"]
    assert [name for name, layout in layouts.items() if layout.interleaved] == ["gpt_oss"]
    assert [name for name, layout in layouts.items() if layout.biased] == ["gpt_oss"]
    assert [name for name, layout in layouts.items() if not layout.gated] == ["nemotron_h"]
    assert {moe.name: find_experts(moe.make())[0].homogeneity for moe in (MIXTRAL, GPT_OSS, NEMOTRON_H)} == {
        "mixtral": None,
        "gpt_oss": 0,
        "nemotron_h": 2,
    }


def test_experts_are_found_beneath_an_adapter_and_once():
    model = MIXTRAL.make()
    names = [ffn.name for ffn in find_all(model)]
    fused = get_peft_model(model, FusionConfig(ratio=0.5))
    assert [ffn.name for ffn in find_all(model)] == names
    assert [experts.width for experts in find_experts(model)] == [64, 64]
    fused.merge_adapter()
    assert [experts.width for experts in find_experts(model)] == [64, 64]


def test_a_module_like_another_shares_its_settings():
    (experts, *_) = find_experts(MIXTRAL.make())
    narrow = {name: torch.zeros(4, 2, 3) for name in experts.layout.names}
    made = experts_like(experts.module, narrow, 8)
    assert made.config is experts.module.config and made.act_fn is experts.module.act_fn
    assert made.intermediate_dim == 8 and made.num_experts == 4 and experts.module.intermediate_dim == 64
    assert [tuple(p.shape) for p in experts.module.parameters()] == [(4, 128, 32), (4, 32, 64)]


class Plain(nn.Module):
    """Experts as most models have them."""

    def __init__(
        self, config=None, count: int = 3, dim: int = 8, width: int = 16, gate: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.num_experts = count
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * width, dim))
        self.down_proj = nn.Parameter(torch.randn(count, dim, width))
        self.act_fn = gate or nn.SiLU()

    def between(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act_fn(gate) * up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        found = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, place = torch.where(top_k_index == expert)
            gate, up = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            out = nn.functional.linear(self.between(gate, up), self.down_proj[expert])
            found.index_add_(0, token, out * top_k_weights[token, place, None])
        return found


class Clamped(Plain):
    def between(self, gate, up):
        return self.act_fn(gate) * up.clamp(-7, 7)


class Normed(Plain):
    def between(self, gate, up):
        hidden = self.act_fn(gate) * up
        return hidden / hidden.norm(dim=-1, keepdim=True)


class Swapped(Plain):
    def between(self, gate, up):
        return self.act_fn(up) * gate


@use_experts_implementation
class Known(Plain):
    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up.clamp(-7, 7)

    def between(self, gate, up):
        return self._apply_gate(torch.cat([gate, up], -1))


@use_experts_implementation
class Crossing(Known):
    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate).softmax(-1) * up


class Config:
    _experts_implementation = "eager"


class Holder(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        (lambda: Clamped(), "their code is not the sum"),
        (lambda: Normed(), "their code is not the sum"),
        (lambda: Swapped(), "their code is not the sum"),
        (lambda: Plain(gate=nn.Softmax(-1)), "computed across neurons"),
        (lambda: Crossing(Config()), "computed across neurons"),
    ],
)
def test_experts_that_do_more_are_refused_by_name(made, problem, unchanged):
    host = Holder(made())
    check = unchanged(host)
    with pytest.raises(ValueError, match=f"The experts 'experts', a {type(host.experts).__name__}, .*{problem}"):
        check_experts(find_experts(host))
    check()


def test_experts_that_do_what_is_known_are_not():
    check_experts(find_experts(Holder(Plain())))
    found = find_experts(Holder(Known(Config())))
    check_experts(found)
    assert found[0].homogeneity == 0  # twice the second piece is not twice the hidden activation
    assert torch.equal(hidden_activations(found[0], torch.full((1, 2), 100.0)), torch.tensor([[700.0]]))


def test_checking_leaves_the_model_and_the_random_state_alone(unchanged):
    for moe in MOES:
        model = moe.make()
        check = unchanged(model)
        check_experts(find_experts(model))
        check()


def test_other_parameters_beside_are_another_layout():
    experts = Plain()
    experts.gate_proj = nn.Parameter(torch.zeros(3, 16, 8))
    assert find_experts(Holder(experts)) == [] and len(find_experts(Holder(Plain()))) == 1


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_that_cannot_be_read_are_refused(dtype):
    host = Holder(Plain())
    host.experts.gate_up_proj = nn.Parameter(torch.zeros(3, 32, 8).to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match="`experts.gate_up_proj` .* cannot be read"):
        read_experts(*find_experts(host))


def test_weights_that_are_not_finite_are_refused(unchanged):
    model = MIXTRAL.make()
    model.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = torch.nan
    check = unchanged(model)
    with pytest.raises(ValueError, match="`model.layers.1.mlp.experts` holds NaN or infinite values in expert 2"):
        get_peft_model(model, FusionConfig(ratio=0.5))
    check()


def test_experts_with_another_adapter_are_refused():
    model = get_peft_model(MIXTRAL.make(), LoraConfig(target_parameters=["experts.down_proj"], target_modules=[]))
    with pytest.raises(ValueError, match="already carries an adapter"):
        get_peft_model(model.base_model.model, FusionConfig(ratio=0.5), adapter_name="ffn")
