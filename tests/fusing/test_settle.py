"""Every combination of settings: refused, or recorded exactly as asked and really used."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_calibrated import DIM, WIDTH, draw, gather, make
from torch.nn.functional import gelu

from peft_fusion.fusing import refit
from peft_fusion.fusing.calibrated import fuse_calibrated
from peft_fusion.fusing.kernels import KERNELS, Kernel
from peft_fusion.fusing.methods import METHODS, narrow_by
from peft_fusion.fusing.metric import FLATTENING
from peft_fusion.fusing.recipe import AUTO, REFITS, REPRESENTATIVES, SCALES, Recipe
from peft_fusion.fusing.settle import settle
from peft_fusion.fusing.statistics import FFNStatistics
from peft_fusion.fusing.weights import FFNWeights, NarrowFFN

NARROW = 5
SETTINGS = list(
    itertools.product((AUTO, *KERNELS), (AUTO, *REPRESENTATIVES), (AUTO, *REFITS), (AUTO, *SCALES))
)  # of each method
KNOWN = {"nothing": ("", False), "statistics": ("data", False), "gradients": ("data", True)}


def weights_and_statistics() -> tuple[FFNWeights, FFNStatistics]:
    weights = make(gated=False)
    statistics, d = gather(weights, gelu), draw(50, DIM, seed=8).float()
    statistics.fisher = d.T @ d
    return weights, statistics


class Used:
    """What the making of a narrow FFN used: the kernels that were computed, and whether the refit ran."""

    def __init__(self, monkeypatch) -> None:
        self.kernels: list[str] = []
        self.refits = 0
        spied = {name: self._spied(name, kernel) for name, kernel in KERNELS.items()}
        monkeypatch.setattr("peft_fusion.fusing.kernels.KERNELS", spied)
        solve = refit._solve

        def counted(*args):
            self.refits += 1
            return solve(*args)

        monkeypatch.setattr(refit, "_solve", counted)

    def _spied(self, name: str, kernel: Kernel) -> Kernel:
        def between(ffn):
            self.kernels.append(name)
            return kernel.between(ffn)

        return Kernel(between, kernel.needs_statistics, kernel.needs_gradients)


def made(weights: FFNWeights, statistics: FFNStatistics, recipe: Recipe) -> NarrowFFN:
    if recipe.calibration:
        return fuse_calibrated(weights, NARROW, statistics, gelu, recipe)
    return narrow_by(weights, NARROW, recipe)


def check_used(weights: FFNWeights, narrow: NarrowFFN, recipe: Recipe, used: Used) -> None:
    """That a narrow FFN is what its recipe says."""
    method, rows = METHODS[recipe.method], narrow.folded().in_weights[0]
    real = bool((torch.cdist(rows, weights.in_weights[0]).min(1).values < 1e-6).all())
    if method.representatives:
        assert real == (recipe.representative == "neuron")
    assert (used.refits > 0) == (recipe.refit != "none")
    if recipe.calibration and "centroid" in method.representatives:
        assert used.kernels == [recipe.kernel]
    assert (narrow.in_scales is not None) == (recipe.scale == "ntk")
    if recipe.scale == "counts":
        assert narrow.scale.sum() == WIDTH and narrow.scale.min() >= 1 and narrow.scale.max() > 1
        assert torch.equal(narrow.scale, narrow.scale.round())


@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("method", METHODS)
def test_every_combination_is_refused_or_recorded_as_asked_and_used(method, known, monkeypatch):
    (weights, statistics), accepted = weights_and_statistics(), set()
    calibration, gradients = KNOWN[known]
    if not gradients:
        statistics.fisher = None
    for settings in SETTINGS:
        asked = Recipe(method, *settings)
        try:
            recipe = settle(asked, calibration, gradients)
        except ValueError as error:
            assert any(f'`{name}="' in str(error) for name in ("kernel", "representative", "refit", "scale"))
            continue
        found = (recipe.kernel, recipe.representative, recipe.refit, recipe.scale)
        assert AUTO not in found and recipe.method == method
        assert all(value in (AUTO, got) for value, got in zip(settings, found, strict=True))
        assert recipe.calibration == (calibration if METHODS[method].calibrated else "")
        accepted.add(recipe)
    assert accepted
    for recipe in accepted:
        if METHODS[method].low_rank:
            continue
        with monkeypatch.context() as patch:
            used = Used(patch)
            check_used(weights, made(weights, statistics, recipe), recipe, used)


@pytest.mark.parametrize("kernel", ["weights", "outputs", "fisher"])
def test_pruning_ranks_neurons_by_what_it_was_asked_for(kernel):
    weights, statistics = weights_and_statistics()
    statistics.fisher = torch.diag(torch.eye(DIM)[0])  # the first output is nearly all that is looked at
    power, out = statistics.second_moment.diagonal(), weights.out_weight.square()
    flattened = out[:, 0] * DIM + FLATTENING * out.sum(1)
    norms = weights.in_weights[0].norm(dim=1) * weights.out_weight.norm(dim=1)
    score = {"weights": norms, "outputs": power * out.sum(1), "fisher": power * flattened}[kernel]
    recipe = settle(Recipe("pruning", kernel=kernel), "data", True)
    best = score.argsort(descending=True)[:NARROW].sort().values
    torch.testing.assert_close(made(weights, statistics, recipe).folded().in_weights[0], weights.in_weights[0][best])


ACCEPTED = {  # explicit settings, nothing "auto": method and what is known -> kernel, representative, refit and scale
    ("fusion", "nothing"): {("weights", "centroid", "none", scale) for scale in ("counts", "none")},
    ("clustering", "nothing"): {("weights", "centroid", "none", "none")},
    ("pruning", "nothing"): {("weights", "neuron", "none", "none")},
    ("fusion", "gradients"): {
        (kernel, representative, refit, scale)
        for kernel, representative, refit, scale in itertools.product(KERNELS, REPRESENTATIVES, REFITS, SCALES)
        if (representative, scale) != ("neuron", "counts")
    },
    ("pruning", "statistics"): {
        (kernel, "neuron", refit, scale)
        for kernel, refit, scale in itertools.product(("weights", "outputs"), REFITS, ("ntk", "none"))
    },
}


@pytest.mark.parametrize(("method", "known"), ACCEPTED)
def test_what_can_be_had(method, known):
    found = set()
    for settings in SETTINGS:
        if AUTO not in settings:
            try:
                found.add(settle(Recipe(method, *settings), *KNOWN[known]))
            except ValueError:
                continue
    assert {(r.kernel, r.representative, r.refit, r.scale) for r in found} == ACCEPTED[method, known]


@pytest.mark.parametrize(
    ("method", "known", "expected"),
    [
        ("fusion", "nothing", ("weights", "centroid", "none", "counts")),
        ("fusion", "statistics", ("outputs", "neuron", "ridge", "ntk")),
        ("fusion", "gradients", ("fisher", "neuron", "ridge", "ntk")),
        ("pruning", "nothing", ("weights", "neuron", "none", "none")),
        ("pruning", "gradients", ("outputs", "neuron", "ridge", "ntk")),
        ("sketch", "gradients", ("weights", "centroid", "none", "none")),
        ("clustering", "gradients", ("weights", "centroid", "none", "none")),
    ],
)
def test_what_auto_comes_to(method, known, expected):
    recipe = settle(Recipe(method), *KNOWN[known])
    assert (recipe.kernel, recipe.representative, recipe.refit, recipe.scale) == expected


CALIBRATED = ("data", True)
REFUSED = {
    "counts of real neurons": (Recipe(scale="counts"), CALIBRATED, '`scale="counts"` .* `representative="centroid"`'),
    "real neurons without data": (Recipe(representative="neuron"), (), '`representative="neuron"` needs to know'),
    "a kernel without data": (Recipe(kernel="outputs"), (), '`kernel="outputs"` needs to know .* call `calibrate'),
    "no gradients": (Recipe(kernel="fisher"), ("data", False), '`kernel="fisher"` needs gradients'),
    "pruning to centroids": (
        Recipe("pruning", representative="centroid"),
        CALIBRATED,
        '`representative="centroid"` works with `method` fusion and clustering, but got "pruning"',
    ),
    "clusters of a sketch": (Recipe("sketch", representative="neuron"), (), "fusion and pruning, but got"),
    "a kernel of saliency": (Recipe("pruning", kernel="ntk"), CALIBRATED, '`kernel="ntk"` works with `method` fusion,'),
    "neurons kept": (Recipe("mmd", keep_neurons=3), (), '`keep_neurons=3` works with `method` sketch, but got "mmd"'),
    "restarts of pruning": (Recipe("pruning", n_init=4), (), "`n_init=4` works with `method` fusion and clustering"),
    "iterations of svd": (Recipe("svd", max_iter=4), (), "`max_iter=4` works with `method` fusion and clustering"),
    "unknown method": (Recipe("nosuch"), (), "`method` must be one of fusion, clustering, .*, but got 'nosuch'"),
    "unknown kernel": (Recipe(kernel="nosuch"), (), "`kernel` must be one of weights, .*, but got 'nosuch'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_why(case):
    asked, known, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        settle(asked, *known)


@pytest.mark.parametrize("setting", ["representative", "refit", "scale"])
def test_unknown_settings_are_refused(setting):
    with pytest.raises(ValueError, match=f"`{setting}` must be one of .*, but got 'nosuch'"):
        Recipe(**{setting: "nosuch"})


def test_an_unknown_kernel_or_method_is_never_another_one():
    weights, statistics = weights_and_statistics()
    for recipe in (Recipe("nosuch"), Recipe("svd")):
        with pytest.raises(ValueError, match="`method"):
            narrow_by(weights, NARROW, recipe)
    for recipe in (Recipe("nosuch", "outputs"), Recipe(kernel="nosuch"), Recipe("sketch", "weights")):
        with pytest.raises(ValueError, match="`kernel|`method"):
            fuse_calibrated(weights, NARROW, statistics, gelu, recipe)


def test_what_is_recorded_can_be_read_again():
    recipe = settle(Recipe(seed=3, n_init=2), "data", True)
    recorded = recipe.to_dict()
    assert list(recorded) == ["method", "kernel", "representative", "refit", "scale", "calibration"]
    assert Recipe.from_dict(recorded).to_dict() == recorded
    for wrong in ({**recorded, "more": ""}, {"method": "fusion"}, {**recorded, "scale": 1}):
        with pytest.raises(ValueError, match="A recorded recipe has method, kernel"):
            Recipe.from_dict(wrong)


def test_settings_reach_the_method(monkeypatch):
    weights, seen = make(gated=False), {}
    for name, recipe in {
        "sketch": Recipe("sketch", keep_neurons=3, seed=4),
        "mmd": Recipe("mmd", seed=4),
        "fuse": Recipe("fusion", n_init=2, max_iter=7, seed=4),
        "clustering": Recipe("clustering", n_init=2, max_iter=7, seed=4),
    }.items():
        monkeypatch.setattr(
            f"peft_fusion.fusing.methods.{name}", lambda *args, name=name, **kwargs: seen.update({name: kwargs})
        )
        narrow_by(weights, NARROW, recipe, 1)
    clustering = {"homogeneity": 1, "n_init": 2, "max_iter": 7, "seed": 4}
    assert seen == {
        "sketch": {"homogeneity": 1, "keep": 3, "seed": 4},
        "mmd": {"homogeneity": 1, "seed": 4},
        "fuse": clustering,
        "clustering": clustering,
    }
