"""What holds for all methods that give a narrow FFN: width, dtype, repeatability, symmetry, wrong input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_fusion import NEURONS, inputs, make, run

from peft_fusion.fusing.methods.clustering import clustering
from peft_fusion.fusing.methods.mmd import mmd
from peft_fusion.fusing.methods.pruning import pruning
from peft_fusion.fusing.methods.sketch import sketch
from peft_fusion.fusing.symmetry import rescale
from peft_fusion.fusing.weights import FFNWeights

METHODS = [clustering, mmd, pruning, sketch]
SEEDED = [clustering, mmd, sketch]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_shapes(method, gated, biases):
    weights = make(gated, biases)
    result = method(weights, 8)
    expected = [(8, block.shape[1]) for block in weights.blocks()]
    assert [tuple(block.shape) for block in result.weights.blocks()] == expected
    assert torch.equal(result.scale, torch.ones(8)) and result.weights.out_bias is weights.out_bias


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_full_width_is_the_ffn_itself(method, gated, dtype):
    weights = make(gated, dtype=dtype)
    found, expected = run(method(weights, NEURONS).folded(), inputs().to(dtype)), run(weights, inputs().to(dtype))
    assert (found - expected).norm() <= (0.03 if dtype == torch.bfloat16 else 1e-12) * expected.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gated", [False, True])
def test_half_precision_is_that_of_the_result_only(method, gated):
    """A bfloat16 network gives what its float32 copy gives, rounded at the end."""
    half = make(gated, dtype=torch.bfloat16)
    as_float = FFNWeights(
        tuple(w.float() for w in half.in_weights),
        tuple(b.float() for b in half.in_biases),
        half.out_weight.float(),
        half.out_bias,
    )
    found, expected = method(half, 8).folded(), method(as_float, 8).folded()
    assert {block.dtype for block in found.blocks()} == {torch.bfloat16}
    for a, b in zip(found.blocks(), expected.blocks(), strict=True):
        assert (a.float() - b.float()).norm() < 0.02 * b.float().norm()


@pytest.mark.parametrize("method", SEEDED)
def test_a_seed_fixes_the_result_and_the_global_generator_is_left_alone(method):
    weights = make(gated=True)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = method(weights, 8, seed=5).folded().blocks()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, method(weights, 8, seed=5).folded().blocks(), strict=True))
    other = method(weights, 8, seed=6).folded().blocks()
    same = all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    if method is not clustering:  # whose engine may or may not find the same clusters from another start
        assert not same


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("gated", "homogeneity", "activation"), [(True, None, F.silu), (False, 1, F.relu)])
def test_symmetries_do_not_change_the_function(method, gated, homogeneity, activation):
    weights = make(gated)
    factor = torch.linspace(0.3, 3, NEURONS, dtype=torch.float64)
    if gated:
        factor[::3] *= -1
    options = {} if method is pruning else {"homogeneity": homogeneity}
    found = [method(w, 12, **options).folded() for w in (weights, rescale(weights, factor, homogeneity or 1))]
    outputs = [run(w, inputs(), activation) for w in found]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("width", [0, -1, NEURONS + 1])
def test_width_out_of_range(method, width):
    with pytest.raises(ValueError, match=f"between 1 and {NEURONS}, but got {width}"):
        method(make(gated=False), width)


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_given_are_left_alone_and_need_no_gradient(method):
    weights = make(gated=True)
    before = [block.clone() for block in weights.blocks()]
    result = method(weights, 8).folded()
    assert all(torch.equal(a, b) for a, b in zip(before, weights.blocks(), strict=True))
    assert not any(block.requires_grad for block in result.blocks())
