"""What runs through routed experts, expert by expert, whichever implementation the model uses."""

from __future__ import annotations

import pytest
import torch
from helpers import logits, relative
from moes import LLAMA4, MIXTRAL, MOES
from torch import Tensor

from peft_fusion.ffn import Routed, capture_experts, find_experts, read_experts, run_expert

every = pytest.mark.parametrize("moe", MOES, ids=lambda a: a.name)


@every
def test_what_experts_put_out_makes_what_their_module_puts_out(moe):
    """Replaced by itself, nothing changes; and with what is put out gone, the model's output does."""
    model = moe.make()
    experts = find_experts(model)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        if moe is not LLAMA4:  # it has one only
            model.set_experts_implementation(implementation)
        before = logits(model, moe)
        with capture_experts(experts, outputs=lambda routed, out: None):
            assert relative(logits(model, moe), before) < 1e-5
        with capture_experts(experts, outputs=lambda routed, out: torch.zeros_like(out)):
            assert relative(logits(model, moe), before) > 1e-4
        assert torch.equal(logits(model, moe), before)  # no hook is left


@every
def test_tokens_and_weights_are_those_of_the_router(moe):
    (experts, *_) = find_experts(moe.make())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, experts.in_dim, generator=generator)
    index = torch.tensor([[0, 2], [2, 3], [0, 3], [3, 2], [2, 0]])  # expert 1 is given none
    weights = torch.rand(5, 2, generator=generator)
    if moe is LLAMA4:
        x = torch.cat([x, torch.zeros(5, experts.in_dim), x.flip(0), x])
    seen: dict[str, tuple[Routed, Tensor, Tensor, Tensor]] = {}
    parts: list[Tensor] = []
    with capture_experts(
        [experts],
        inputs=lambda routed, tensor: parts.append(tensor),
        hidden=lambda routed, tensor: parts.append(tensor),
        outputs=lambda routed, tensor: seen.update({routed.name: (routed, *parts[-2:], tensor)}),
    ):
        experts.module(x) if moe is LLAMA4 else experts.module(x, index, weights)
    assert list(seen) == [f"{experts.name}.{i}" for i in (0, 2, 3)]
    for i, (routed, given, hidden, out) in zip((0, 2, 3), seen.values(), strict=True):
        tokens = list(range(5)) if moe is LLAMA4 else [t for t in range(5) if i in index[t]]
        rows = x.chunk(4)[i] if moe is LLAMA4 else x
        factor = [1.0] * 5 if moe is LLAMA4 else [float(weights[t, index[t].tolist().index(i)]) for t in tokens]
        assert routed.tokens.tolist() == tokens and routed.weights.tolist() == pytest.approx(factor)
        assert torch.equal(given, rows[tokens]) and hidden.shape == (len(tokens), experts.width)
        assert torch.equal(out, run_expert(experts, read_experts(experts)[i], rows[tokens]))


def test_gradients_by_what_an_expert_puts_out_have_the_routers_weight_in_them():
    (experts, *_) = find_experts(MIXTRAL.make())
    x, index, weights = torch.randn(3, 32), torch.tensor([[0], [0], [1]]), torch.tensor([[0.5], [2.0], [1.0]])
    leaves: dict[str, Tensor] = {}

    def note(routed: Routed, out: Tensor) -> Tensor:
        leaves[routed.name] = out.detach().requires_grad_()
        return leaves[routed.name].clone()

    with capture_experts([experts], outputs=note):
        experts.module(x, index, weights).sum().backward()
    assert torch.equal(leaves[f"{experts.name}.0"].grad, torch.tensor([[0.5], [2.0]]).expand(2, 32))


def test_hidden_activations_can_be_replaced():
    (experts, *_) = find_experts(MIXTRAL.make())
    x, index = torch.randn(3, 32), torch.zeros(3, 1, dtype=torch.int64)
    with capture_experts([experts], hidden=lambda routed, hidden: 2 * hidden, outputs=lambda routed, out: None):
        doubled = experts.module(x, index, torch.ones(3, 1))
    torch.testing.assert_close(doubled, 2 * experts.module(x, index, torch.ones(3, 1)))
