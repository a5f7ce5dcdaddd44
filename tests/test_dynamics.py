"""The oracle of the method: a network of duplicated neurons and its fused form train alike."""

from __future__ import annotations

import pytest
import torch
from architectures import BY_NAME
from peft import get_peft_model
from torch import nn

from peft_fusion import FusionConfig
from peft_fusion.ffn import find_ffns, projection_tensors, read_ffn
from peft_fusion.fusing.weights import FFNWeights

STEPS = 40


def duplicate_neurons(model: nn.Module, distinct: int, seed: int = 0) -> None:
    """Overwrites every FFN's neurons by repetitions of the first few, in groups of 1 to 5, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    for ffn in find_ffns(model):
        weights = read_ffn(ffn)
        sizes = 1 + torch.arange(distinct) % 5
        index = torch.repeat_interleave(torch.arange(distinct), sizes)
        assert len(index) == weights.width, f"groups of 1 to 5 make {len(index)} neurons, not {weights.width}"
        index = index[torch.randperm(len(index), generator=generator)]
        repeated = FFNWeights(
            tuple(w[index] for w in weights.in_weights),
            tuple(None if b is None else b[index] for b in weights.in_biases),
            weights.out_weight[index],
            weights.out_bias,
        )
        tensors = projection_tensors(repeated, ffn)
        for module, (weight, bias) in zip(ffn.projections, tensors, strict=True):
            module.weight.data.copy_(weight)
            if bias is not None:
                module.bias.data.copy_(bias)


def train_only(model: nn.Module, parameters: list[nn.Parameter], architecture) -> list[torch.Tensor]:
    """The logits after each of a number of Adam steps on some of a model's parameters."""
    optimizer = torch.optim.Adam(parameters, lr=1e-3, eps=1e-12)
    outputs = []
    for step in range(STEPS):
        model(**architecture.batch(labels=True, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            outputs.append(model(**architecture.batch(seed=99)).logits)
    return outputs


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("scale", ["counts", "none"])
def test_fused_duplicates_follow_the_full_model_under_adam(name, scale):
    architecture = BY_NAME[name]
    full = architecture.make(intermediate_size=60).double()
    duplicate_neurons(full, distinct=20)
    copy = architecture.make(intermediate_size=60).double()
    copy.load_state_dict(full.state_dict())
    fused = get_peft_model(copy, FusionConfig(intermediate_size=20, scale=scale), autocast_adapter_dtype=False)
    trained = {id(p) for ffn in find_ffns(full) for m in ffn.projections for p in m.parameters()}
    for parameter in full.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    expected = train_only(full, [p for p in full.parameters() if p.requires_grad], architecture)
    followed = train_only(fused, [p for p in fused.parameters() if p.requires_grad], architecture)
    assert (expected[-1] - expected[0]).norm() > 0.1 * expected[0].norm()  # it did move
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(followed, expected, strict=True))
    if scale == "counts":
        assert worst < 1e-6
    else:
        assert worst > 1e-2  # the standalone scale is what makes them follow
