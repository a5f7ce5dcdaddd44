"""Where a layer adds up: what goes into the norm it ends with, or what it passes on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_fusion.observe.sums import added_up, ends_with


class Layer(nn.Module):
    """x + W x, and what is said to come behind it."""

    def __init__(self, *behind: nn.Module) -> None:
        super().__init__()
        self.linear, self.behind = nn.Linear(4, 4), nn.Sequential(*behind)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        y = x + self.linear(x)
        for module in self.behind:
            y = module(y)
        return y, None

    def sum(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Flat(nn.LayerNorm):
    """A norm of tokens in one row."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(0, 1)).view_as(input)


@pytest.mark.parametrize("behind", [[nn.LayerNorm(4)], [nn.LayerNorm(4), nn.Identity()], [Flat(4)]], ids=len)
def test_the_sum_is_what_goes_into_the_last_part(behind):
    layer, x = Layer(*behind), torch.randn(2, 3, 4)
    with ends_with(layer) as found, torch.no_grad():
        last = found(layer(x))
    assert last is behind[-1]
    with added_up(behind[0]) as sums, torch.no_grad():
        found_sum = sums(layer(x))
    assert torch.equal(found_sum, layer.sum(x))
    assert not torch.equal(found_sum, layer(x)[0])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())


def test_without_a_norm_it_is_what_is_passed_on():
    layer, x = Layer(), torch.randn(2, 3, 4)
    with added_up(None) as sums, ends_with(layer) as found:
        output = layer(x)
    assert sums(output) is output[0]
    assert found(output) is None  # the addition is no part


def test_a_part_that_runs_twice_is_no_end():
    norm = nn.LayerNorm(4)
    layer = Layer(norm, norm)
    with ends_with(layer) as found:
        assert found(layer(torch.randn(2, 3, 4))) is None
