"""The scales that match tangent kernels: the kernels against autograd, the fit, what happens where it cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_calibrated import DIM, WIDTH, draw, gather, make, outputs, plain, settled
from torch import Tensor
from torch.nn.functional import gelu, silu

from peft_fusion.fusing import gradient_kernels
from peft_fusion.fusing.activations import run
from peft_fusion.fusing.calibrated import fuse_calibrated
from peft_fusion.fusing.gradient_kernels import TokenGradients, adam_kernels
from peft_fusion.fusing.rows import select_rows
from peft_fusion.fusing.scales import MOST, SEQUENCES, fit_scales, match_sizes
from peft_fusion.fusing.weights import FFNWeights, cast

COUNTS = (5, 0, 9, 7, 3)
KINDS = [(False, gelu, True), (True, silu, False), (True, silu, True)]


def sample(seed: int = 50) -> TokenGradients:
    tokens = sum(COUNTS)
    return TokenGradients(draw(tokens, DIM, seed=seed), draw(tokens, DIM, seed=seed + 1), COUNTS)


def by_autograd(weights: FFNWeights, activation, tokens: TokenGradients) -> list[Tensor]:
    """<g_n, sign g_m> of every projection, from the FFN written out."""
    ins = [w.clone().requires_grad_() for w in weights.in_weights]
    biases = [None if b is None else b.clone().requires_grad_() for b in weights.in_biases]
    out = weights.out_weight.clone().requires_grad_()
    copy = FFNWeights(tuple(ins), tuple(biases), out, weights.out_bias)
    groups = [[w, b] if b is not None else [w] for w, b in zip(ins, biases, strict=True)] + [[out]]
    gradients: list[list[Tensor]] = [[] for _ in groups]
    for x, d in zip(tokens.inputs.split(COUNTS), tokens.gradients.split(COUNTS), strict=True):
        value = (outputs(plain(copy), activation, x) * d).sum()
        for group, found in zip(groups, gradients, strict=True):
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, group, retain_graph=True)]))
    return [torch.stack(found) @ torch.stack(found).sign().T for found in gradients]


@pytest.mark.parametrize(("gated", "activation", "bias"), KINDS)
@pytest.mark.parametrize("memory", [1, 2**26])
def test_kernels_are_those_of_autograd(gated, activation, bias, memory, monkeypatch):
    monkeypatch.setattr(gradient_kernels, "BLOCK_MEMORY", memory)
    weights, tokens = make(gated, bias), sample()
    for kernel, expected in zip(
        adam_kernels(weights, activation, tokens), by_autograd(weights, activation, tokens), strict=True
    ):
        torch.testing.assert_close(kernel, expected.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("gated", "activation", "bias"), KINDS)
def test_a_scale_multiplies_its_part_of_the_kernel_and_leaves_the_function(gated, activation, bias):
    weights, tokens = make(gated, bias), sample()
    kept = 12
    narrow, x = select_rows(weights, torch.arange(kept)), draw(50, DIM, seed=9)
    kernels = adam_kernels(weights, activation, tokens)
    matched = fit_scales(match_sizes(weights, narrow, activation, x), kernels, tokens, activation)
    torch.testing.assert_close(
        outputs(matched, activation, x), outputs(plain(narrow), activation, x), rtol=1e-5, atol=1e-5
    )
    n = len(COUNTS)
    weight = torch.ones(n, n).fill_diagonal_((n - 1) / (SEQUENCES - 1))
    scales = [*matched.in_scales, matched.scale]
    for scale, wide, small in zip(scales, kernels, adam_kernels(narrow, activation, tokens), strict=True):
        assert torch.equal(scale, scale[:1].expand(kept))
        residual = wide - scale[0] * small
        size = float((weight * wide * small).sum().abs())
        assert float((weight * residual * small).sum()) == pytest.approx(0, abs=1e-4 * size)


def test_scales_of_duplicates_are_the_counts():
    weights, tokens = make(True), sample()
    blocks = [w.repeat(3, 1) for w in weights.in_weights]
    thrice = FFNWeights(tuple(blocks), weights.in_biases, weights.out_weight.repeat(3, 1), None)
    folded = FFNWeights(weights.in_weights, weights.in_biases, weights.out_weight * 3, None)
    matched = match_sizes(thrice, folded, silu, draw(100, DIM, seed=9))
    matched = fit_scales(matched, adam_kernels(thrice, silu, tokens), tokens, silu)
    # The in-gradients of a neuron that puts out three times as much are three times as large.
    torch.testing.assert_close(matched.scale, torch.full((WIDTH,), 3.0))
    for scale in matched.in_scales:
        torch.testing.assert_close(scale, torch.ones(WIDTH))


def test_without_a_usable_kernel_the_norms_are_matched():
    weights, tokens, x = make(False), sample(), draw(100, DIM, seed=9)
    narrow = select_rows(weights, torch.arange(4))
    expected = match_sizes(weights, narrow, gelu, x)
    nothing = TokenGradients(tokens.inputs, torch.zeros_like(tokens.gradients), COUNTS)
    one = TokenGradients(tokens.inputs, tokens.gradients, (sum(COUNTS),))
    for unusable in (nothing, one):
        found = fit_scales(expected, adam_kernels(weights, gelu, unusable), unusable, gelu)
        torch.testing.assert_close(found.scale, expected.scale)
        torch.testing.assert_close(found.in_scales[0], expected.in_scales[0])


@pytest.mark.parametrize(("size", "bound"), [(1e6, MOST), (-1.0, 1 / MOST), (0.0, 1 / MOST)])
def test_a_scale_stays_near_that_of_the_norms(size, bound):
    weights, tokens, x = make(False), sample(), draw(100, DIM, seed=9)
    narrow = select_rows(weights, torch.arange(4))
    kernels = tuple(size * kernel for kernel in adam_kernels(weights, gelu, tokens))
    sized = match_sizes(weights, narrow, gelu, x)
    torch.testing.assert_close(fit_scales(sized, kernels, tokens, gelu).scale, bound * sized.scale)


def test_fitting_twice_changes_nothing_more():
    weights, statistics, tokens = make(False), gather(make(False), gelu), sample()
    before = fuse_calibrated(weights, 5, statistics, gelu, settled(statistics))
    kernels = tuple(2 * kernel for kernel in adam_kernels(before.folded(), gelu, tokens))
    after = fit_scales(before, kernels, tokens, gelu)
    torch.testing.assert_close(after.scale, torch.full((5,), 2.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(after.folded().out_weight, before.folded().out_weight)
    again = fit_scales(after, kernels, tokens, gelu)
    torch.testing.assert_close(again.scale, after.scale)
    torch.testing.assert_close(again.weights.out_weight, after.weights.out_weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_and_the_function_too(dtype):
    weights, tokens = make(True), sample()
    narrow = cast(select_rows(weights, torch.arange(6)), dtype)
    sized = match_sizes(weights, cast(narrow, torch.float32), silu, draw(100, DIM, seed=9))
    sized = replace(sized, weights=cast(sized.weights, dtype))
    fitted = fit_scales(sized, adam_kernels(weights, silu, tokens), tokens, silu)
    assert {block.dtype for block in fitted.weights.blocks()} == {dtype} and fitted.scale.dtype == torch.float32
    for block, expected in zip(fitted.folded().blocks(), narrow.blocks(), strict=True):
        torch.testing.assert_close(block, expected, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(("gated", "activation", "bias"), KINDS)
def test_an_ffn_runs_as_it_is_written_out(gated, activation, bias):
    weights, x = make(gated, bias), draw(20, DIM, seed=9)
    torch.testing.assert_close(run(weights, activation, x), outputs(plain(weights), activation, x))
    batched = run(weights, activation, x.view(4, 5, DIM))
    torch.testing.assert_close(batched.view(20, -1), run(weights, activation, x))
