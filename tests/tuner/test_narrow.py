"""The narrow projections in every precision: what they put out and what they keep for the backward pass."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_fusion.tuner.narrow import NarrowInProjection, NarrowOutProjection, NarrowProjection

TOKENS, WIDTH, NEURONS = 24, 16, 40
SCALES = 3 * 4 * NEURONS  # the bytes of three scales in full precision


class FFN(nn.Module):
    """A SwiGLU of any three projections."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def native(bias: bool) -> FFN:
    torch.manual_seed(0)
    return FFN(nn.Linear(WIDTH, NEURONS, bias), nn.Linear(WIDTH, NEURONS, bias), nn.Linear(NEURONS, WIDTH, bias))


def narrow(like: FFN) -> FFN:
    """The narrow projections with the same weights, and scales of their own."""

    def projection(kind: type[NarrowProjection], linear: nn.Linear) -> NarrowProjection:
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return kind(linear.weight.detach().clone(), bias, 0.5 + torch.rand(NEURONS))

    ins = (projection(NarrowInProjection, linear) for linear in (like.gate, like.up))
    return FFN(*ins, projection(NarrowOutProjection, like.down))


def run(ffn: FFN, dtype: torch.dtype, autocast: torch.dtype | None) -> tuple[list[torch.dtype], int]:
    """The dtype of what each projection puts out, and the bytes that one forward pass keeps for its backward pass."""
    kept: dict[int, Tensor] = {}
    dtypes: list[torch.dtype] = []
    hooks = [m.register_forward_hook(lambda m, i, out: dtypes.append(out.dtype)) for m in ffn.children()]

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used again
        return tensor

    x = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    context = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), context:
        ffn(x).sum().backward()
    for hook in hooks:
        hook.remove()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in ffn.parameters())
    return dtypes, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("inputs", "autocast"),
    [
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, None),
        (torch.float16, None),
    ],
)
def test_dtypes_and_memory_are_those_of_plain_linear_modules(inputs, autocast, bias):
    plain = native(bias)
    masters = narrow(plain)  # in full precision, whatever the model's
    dtypes, kept = run(plain if autocast else plain.to(inputs), inputs, autocast)
    own_dtypes, own = run(masters, inputs, autocast)
    assert own_dtypes == dtypes
    assert kept <= own <= kept + SCALES


def test_scales_are_applied_in_full_precision():
    layer = NarrowInProjection(torch.ones(1, 1), None, torch.tensor([1.0038]))  # bf16 would round it to 1
    assert layer(torch.tensor([[2 - 2.0**-7]], dtype=torch.bfloat16)) == 2
