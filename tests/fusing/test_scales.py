"""The scales that match tangent kernels: the kernels against autograd, the fit, what happens where it cannot be."""

from __future__ import annotations

import pytest
import torch
from test_calibrated import DIM, WIDTH, draw, gather, make, outputs, plain, settled
from torch import Tensor
from torch.nn.functional import gelu, silu

from peft_fusion.fusing import gradient_kernels
from peft_fusion.fusing.calibrated import fuse_calibrated
from peft_fusion.fusing.gradient_kernels import TokenGradients, adam_kernels
from peft_fusion.fusing.rows import select_rows
from peft_fusion.fusing.scales import MOST, SEQUENCES, fitted_scales, match_sizes, rescaled
from peft_fusion.fusing.weights import FFNWeights, NarrowFFN, cast

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
def test_matched_scales_leave_the_function(gated, activation, bias):
    weights, x = make(gated, bias), draw(100, DIM, seed=8)
    narrow = select_rows(weights, torch.arange(0, WIDTH, 2))
    matched = match_sizes(weights, narrow, activation, x)
    assert float(matched.scale.min()) > 1.2  # half the neurons are gone
    torch.testing.assert_close(outputs(matched, activation, x), outputs(plain(narrow), activation, x))


def fit_scales(narrow: NarrowFFN, kernels: list[Tensor], tokens: TokenGradients, activation) -> NarrowFFN:
    return rescaled(narrow, fitted_scales(narrow, kernels, tokens, activation))


def thrice(weights: FFNWeights) -> tuple[FFNWeights, FFNWeights]:
    """Every neuron three times, and the same function in one third of the neurons."""
    repeated = FFNWeights(
        tuple(w.repeat(3, 1) for w in weights.in_weights), weights.in_biases, weights.out_weight.repeat(3, 1), None
    )
    return repeated, FFNWeights(weights.in_weights, weights.in_biases, weights.out_weight * 3, None)


def test_scales_of_duplicates_are_the_counts_matched_and_fitted():
    weights, tokens = make(True), sample()
    repeated, folded = thrice(weights)
    matched = match_sizes(repeated, folded, silu, draw(100, DIM, seed=9))
    fitted = fit_scales(matched, adam_kernels(repeated, silu, tokens), tokens, silu)
    for found in (matched, fitted):
        # The in-gradients of a neuron that puts out three times as much are three times as large.
        torch.testing.assert_close(found.scale, torch.full((WIDTH,), 3.0))
        for scale in found.in_scales:
            torch.testing.assert_close(scale, torch.ones(WIDTH))


@pytest.mark.parametrize(("gated", "activation", "bias"), KINDS)
def test_a_scale_multiplies_its_part_of_the_kernel_and_leaves_the_function(gated, activation, bias):
    weights, tokens = make(gated, bias), sample()
    kept = 12
    narrow, x = select_rows(weights, torch.arange(kept)), draw(50, DIM, seed=9)
    kernels = adam_kernels(weights, activation, tokens)
    matched = match_sizes(weights, narrow, activation, x)
    fitted = fit_scales(matched, kernels, tokens, activation)
    torch.testing.assert_close(
        outputs(fitted, activation, x), outputs(plain(narrow), activation, x), rtol=1e-5, atol=1e-5
    )
    n = len(COUNTS)
    weight = torch.ones(n, n).fill_diagonal_((n - 1) / (SEQUENCES - 1))
    scales = [*fitted.in_scales, fitted.scale]
    assert not any(torch.allclose(a, b) for a, b in zip(scales, [*matched.in_scales, matched.scale], strict=True))
    for scale, wide, small in zip(scales, kernels, adam_kernels(narrow, activation, tokens), strict=True):
        assert torch.equal(scale, scale[:1].expand(kept))
        residual = wide - scale[0] * small
        size = float((weight * wide * small).sum().abs())
        assert float((weight * residual * small).sum()) == pytest.approx(0, abs=1e-4 * size)


def test_without_a_usable_kernel_the_norms_stay_matched():
    weights, tokens, x = make(False), sample(), draw(100, DIM, seed=9)
    matched = match_sizes(weights, select_rows(weights, torch.arange(4)), gelu, x)
    nothing = TokenGradients(tokens.inputs, torch.zeros_like(tokens.gradients), COUNTS)
    one = TokenGradients(tokens.inputs, tokens.gradients, (sum(COUNTS),))
    for unusable in (nothing, one):
        found = fit_scales(matched, adam_kernels(weights, gelu, unusable), unusable, gelu)
        assert torch.equal(found.scale, matched.scale) and torch.equal(found.in_scales[0], matched.in_scales[0])


@pytest.mark.parametrize(("size", "bound"), [(1e6, MOST), (-1.0, 1 / MOST), (0.0, 1 / MOST)])
def test_a_scale_stays_near_that_of_the_norms(size, bound):
    weights, tokens, x = make(False), sample(), draw(100, DIM, seed=9)
    matched = match_sizes(weights, select_rows(weights, torch.arange(4)), gelu, x)
    kernels = tuple(size * kernel for kernel in adam_kernels(weights, gelu, tokens))
    torch.testing.assert_close(fit_scales(matched, kernels, tokens, gelu).scale, bound * matched.scale)


def test_fitting_twice_changes_nothing_more():
    weights, tokens, x = make(False), sample(), draw(100, DIM, seed=9)
    matched, kernels = (
        match_sizes(weights, select_rows(weights, torch.arange(8)), gelu, x),
        adam_kernels(weights, gelu, tokens),
    )
    once = fit_scales(matched, kernels, tokens, gelu)
    again = fit_scales(once, kernels, tokens, gelu)
    torch.testing.assert_close(again.scale, once.scale)
    torch.testing.assert_close(again.weights.out_weight, once.weights.out_weight)


def test_scales_are_fitted_from_matched_ones_only():
    weights, tokens = make(False), sample()
    with pytest.raises(ValueError, match="call `match_sizes` first"):
        fit_scales(plain(weights), adam_kernels(weights, gelu, tokens), tokens, gelu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_calibrated_ffn_has_matched_scales_that_can_be_fitted_in_its_dtype(dtype):
    weights, statistics, tokens = cast(make(False), dtype), gather(make(False), gelu), sample()
    narrow = fuse_calibrated(weights, 5, statistics, gelu, settled(statistics))
    kernels = tuple(2 * kernel for kernel in adam_kernels(narrow.folded(), gelu, tokens))
    fitted = fit_scales(narrow, kernels, tokens, gelu)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(fitted.scale, torch.full((5,), 2.0), rtol=tolerance, atol=0)
    assert fitted.weights.out_weight.dtype == dtype and not torch.equal(narrow.scale, fitted.scale)
    before, after = cast(narrow.folded(), torch.float32), cast(fitted.folded(), torch.float32)
    for a, b in zip(after.blocks(), before.blocks(), strict=True):
        assert float((a - b).norm() / b.norm()) < (1e-6 if dtype == torch.float32 else 0.01)
