"""What must always hold, on random models: full width, duplicates, symmetries, seeds."""

from __future__ import annotations

import copy

import torch
from hosts import Host, hosts, inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_fusion import FusionConfig, fuse
from peft_fusion.fusing.methods import METHODS

some = settings(max_examples=25, deadline=None, derandomize=True, database=None)
methods = st.sampled_from(list(METHODS))


def fused(host: Host, **config) -> PeftModel:
    return get_peft_model(
        copy.deepcopy(host), FusionConfig(**{"multiple_of": 1, **config}), autocast_adapter_dtype=False
    )


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


@some
@given(hosts(), methods, st.sampled_from([torch.float64, torch.float32]))
def test_full_width_is_exact(host, method, dtype):
    host, x = host.to(dtype), inputs(host.dim).to(dtype)
    expected = outputs(host, x)
    model = fused(host, ratio=1.0, method=method)
    tolerance = 50 * torch.finfo(dtype).eps
    torch.testing.assert_close(outputs(model, x), expected, rtol=tolerance, atol=tolerance)
    with model.disable_adapter():
        assert torch.equal(outputs(model, x), expected)
    torch.testing.assert_close(outputs(copy.deepcopy(model).merge_and_unload(), x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(outputs(model.unload(), x), expected)


DISTINCT = 5


@some
@given(hosts(width=20), st.randoms(use_true_random=False), st.integers(0, 6))
def test_duplicates_fuse_exactly_and_follow_the_full_model_under_adam(host, random, more):
    for layer in host.layers:
        places = [*range(DISTINCT), *(random.randrange(DISTINCT) for _ in range(20 - DISTINCT))]
        layer.rearrange(torch.tensor(random.sample(places, 20)))
    narrow = fused(host, intermediate_size=DISTINCT + more)
    torch.testing.assert_close(outputs(narrow, inputs(host.dim)), outputs(host, inputs(host.dim)), rtol=1e-9, atol=1e-9)
    for one, other in zip(trained(narrow), trained(host), strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-6


def trained(model: nn.Module) -> list[Tensor]:
    """The outputs after each of a few of Adam's steps."""
    x, y = inputs(model.dim, seed=1), inputs(model.dim, seed=2)
    start = outputs(model, x)
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-15)
    found = []
    for _ in range(6):
        adam.zero_grad()
        (model(x) - y).square().mean().backward()
        adam.step()
        found.append(outputs(model, x))
    assert float((found[-1] - start).norm() / start.norm()) > 1e-3  # it did move
    return found


@some
@given(hosts(symmetric=True), st.sampled_from(["fusion", "clustering"]), st.integers(0, 2**31))
def test_symmetries_do_not_change_the_fused_function(host, method, seed):
    """Neurons in another order, and rescaled (gated ones flipped, too) without another function."""
    other, x = copy.deepcopy(host), inputs(host.dim)
    generator = torch.Generator().manual_seed(seed)
    for layer in other.layers:
        neurons = len(layer.rows()[-1])
        layer.rearrange(torch.randperm(neurons, generator=generator))
        factor = (4 * torch.rand(neurons, generator=generator, dtype=torch.float64) - 2).exp()
        flips = torch.randint(0, 2, (neurons,), generator=generator) if layer.layout.gated else torch.ones(neurons)
        layer.rescale(factor * (2 * flips - 1))
    torch.testing.assert_close(outputs(other, x), outputs(host, x))
    found, expected = (outputs(fused(one, ratio=0.5, method=method), x) for one in (other, host))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@some
@given(hosts(), methods, st.integers(0, 1000), st.integers(1, 3))
def test_the_seed_decides_and_global_random_numbers_are_left_alone(host, method, seed, n_init):
    takes = {"n_init": n_init} if "n_init" in METHODS[method].takes else {}
    config = {"ratio": 0.5, "method": method, "seed": seed, **takes}
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        model = fused(host, **config)
        plain = fuse(copy.deepcopy(host), FusionConfig(multiple_of=1, **config))
        merged = copy.deepcopy(model).merge_and_unload()
        assert torch.equal(torch.get_rng_state(), before)
        found.append([*model.state_dict().values(), *plain.state_dict().values(), *merged.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@some
@given(hosts(), st.integers(0, 1000))
def test_random_narrow_weights_are_drawn_by_the_seed_alone(host, seed):
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        found.append([fused(host, ratio=0.5, init_weights=False, seed=s).state_dict() for s in (seed, seed + 1)])
        assert torch.equal(torch.get_rng_state(), before)
    narrow = [name for name in found[0][0] if name.endswith("narrow.default.weight")]
    assert all(torch.equal(found[0][i][name], found[1][i][name]) for name in narrow for i in (0, 1))
    assert narrow and not any(torch.equal(found[0][0][name], found[0][1][name]) for name in narrow)
