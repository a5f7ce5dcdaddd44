"""The paper's method on bare tensors, and the symmetries that must not matter to it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fusion.fusing.cluster.kmeans import kernel_kmeans
from peft_fusion.fusing.methods.fusion import average, fuse
from peft_fusion.fusing.symmetry import balancing_factors, rescale
from peft_fusion.fusing.weights import FFNWeights, NarrowFFN, stack_rows

IN, OUT, NEURONS = 6, 5, 40


def make(gated: bool, biases: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0) -> FFNWeights:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    ins = tuple(normal(NEURONS, IN) for _ in range(1 + gated))
    return FFNWeights(ins, tuple(normal(NEURONS) if biases else None for _ in ins), normal(NEURONS, OUT), normal(OUT))


def run(weights: FFNWeights, x: Tensor, activation=F.gelu, scale: Tensor | None = None) -> Tensor:
    ins = [x @ w.T + (0 if b is None else b) for w, b in zip(weights.in_weights, weights.in_biases, strict=True)]
    hidden = activation(ins[0]) * (ins[1] if weights.gated else 1)
    return (hidden if scale is None else hidden * scale) @ weights.out_weight + weights.out_bias


def run_narrow(narrow: NarrowFFN, x: Tensor, activation=F.gelu) -> Tensor:
    return run(narrow.weights, x, activation, narrow.scale.to(x.dtype))


def inputs() -> Tensor:
    return torch.randn(20, IN, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize("gated", [False, True])
def test_equals_the_ffn_with_every_neuron_replaced_by_its_centroid(gated):
    weights = make(gated)
    narrow = fuse(weights, 8) if not gated else None
    if narrow is None:  # without its symmetry, a gated FFN's centroids are plain means as well
        clustering = kernel_kmeans(stack_rows(weights, torch.float64) @ stack_rows(weights, torch.float64).T, 8)
        narrow = NarrowFFN(average(weights, clustering), clustering.counts.double())
    rows = stack_rows(narrow.weights, torch.float64)
    nearest = torch.cdist(stack_rows(weights, torch.float64), rows).argmin(1)
    assert torch.equal(torch.bincount(nearest, minlength=8).double(), narrow.scale.double())
    expanded = FFNWeights(
        tuple(w[nearest] for w in narrow.weights.in_weights),
        tuple(b[nearest] for b in narrow.weights.in_biases),
        narrow.weights.out_weight[nearest],
        weights.out_bias,
    )
    torch.testing.assert_close(run_narrow(narrow, inputs()), run(expanded, inputs()))
    for j in range(8):
        torch.testing.assert_close(rows[j], stack_rows(weights, torch.float64)[nearest == j].mean(0))


@pytest.mark.parametrize("gated", [False, True])
def test_folding_the_scale_is_exact(gated):
    narrow = fuse(make(gated), 8)
    torch.testing.assert_close(run(narrow.folded(), inputs()), run_narrow(narrow, inputs()))


@pytest.mark.parametrize("gated", [False, True])
def test_duplicates_fuse_exactly(gated):
    weights = make(gated)
    index = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(1)) % 10
    repeated = select(weights, index)
    narrow = fuse(repeated, 10)
    torch.testing.assert_close(run_narrow(narrow, inputs()), run(repeated, inputs()))
    found = stack_rows(narrow.weights, torch.float64)
    distances = torch.cdist(stack_rows(weights, torch.float64)[:10], found).min(1).values
    flipped = rescale(narrow.weights, -torch.ones(10, dtype=torch.float64)) if gated else narrow.weights
    distances = torch.minimum(
        distances,
        torch.cdist(stack_rows(weights, torch.float64)[:10], stack_rows(flipped, torch.float64)).min(1).values,
    )
    assert distances.max() < 1e-6  # in the original's own coordinates, which Adam's steps depend on


def select(weights: FFNWeights, index: Tensor) -> FFNWeights:
    return FFNWeights(
        tuple(w[index] for w in weights.in_weights),
        tuple(None if b is None else b[index] for b in weights.in_biases),
        weights.out_weight[index],
        weights.out_bias,
    )


@pytest.mark.parametrize(("gated", "homogeneity", "activation"), [(True, None, F.silu), (False, 1, F.relu)])
@pytest.mark.parametrize("biases", [False, True])
def test_symmetries_do_not_change_the_fused_function(gated, homogeneity, activation, biases):
    weights = make(gated, biases)
    generator = torch.Generator().manual_seed(3)
    factor = torch.rand(NEURONS, generator=generator, dtype=torch.float64) * 4 + 0.1
    if gated:
        factor = factor * torch.randint(0, 2, (NEURONS,), generator=generator).mul(2).sub(1)
    other = rescale(weights, factor, homogeneity or 1)
    torch.testing.assert_close(run(other, inputs(), activation), run(weights, inputs(), activation))
    fused, fused_other = fuse(weights, 12, homogeneity=homogeneity), fuse(other, 12, homogeneity=homogeneity)
    torch.testing.assert_close(
        run_narrow(fused_other, inputs(), activation),
        run_narrow(fused, inputs(), activation),
        rtol=1e-5,
        atol=1e-5,
    )


def test_squared_relu_is_homogeneous_of_degree_two():
    weights = make(gated=False)
    factor = torch.linspace(0.2, 3, NEURONS, dtype=torch.float64)
    activation = lambda z: F.relu(z) ** 2  # noqa: E731
    torch.testing.assert_close(
        run(rescale(weights, factor, 2), inputs(), activation), run(weights, inputs(), activation)
    )


def test_balancing_copes_with_dead_neurons():
    weights = make(gated=True, biases=False)
    weights.in_weights[1][3] = 0
    weights.out_weight[4] = 0
    factors = balancing_factors(weights)
    assert torch.isfinite(factors).all() and (factors != 0).all()


def test_full_width_is_the_ffn_itself():
    weights = make(gated=True)
    narrow = fuse(weights, NEURONS)
    assert narrow.weights is weights and torch.equal(narrow.scale, torch.ones(NEURONS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    narrow = fuse(make(gated=True, dtype=dtype), 8)
    assert {block.dtype for block in narrow.weights.blocks()} == {dtype}


@pytest.mark.parametrize("width", [0, -1, NEURONS + 1])
def test_width_out_of_range(width):
    with pytest.raises(ValueError, match=f"between 1 and {NEURONS}, but got {width}"):
        fuse(make(gated=False), width)
