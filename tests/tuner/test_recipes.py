"""Every method behind the one configuration: fused, trained, saved, reloaded and merged, for every layout."""

from __future__ import annotations

import pytest
import torch
from architectures import ALIKE, ARCHITECTURES, BY_NAME
from helpers import half, logits, relative, train
from peft import PeftModel, get_peft_model

from peft_fusion import FusionConfig, calibrate, fidelity

every = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
RECIPES = {
    "clustering": {"method": "clustering"},
    "sketch": {"method": "sketch", "keep_neurons": 4},
    "mmd": {"method": "mmd"},
    "svd": {"method": "svd"},
    "pruning": {"method": "pruning"},
    "calibrated": {},
    "calibrated centroids": {"representative": "centroid"},
    "calibrated outputs": {"kernel": "outputs"},
    "calibrated ntk": {"kernel": "ntk"},
    "calibrated, the paper's scale": {"representative": "centroid", "scale": "counts"},
    "calibrated pruning": {"method": "pruning"},
}
MATRIX = [(a, recipe) for recipe in RECIPES for a in ARCHITECTURES if a.name not in ALIKE or recipe == "calibrated"]
every_recipe = pytest.mark.parametrize(("architecture", "recipe"), MATRIX, ids=lambda a: getattr(a, "name", a))


def make(architecture, recipe: str, ratio: float = 0.5):
    model, config = architecture.make(), half(architecture, **RECIPES[recipe])
    config.ratio = ratio
    if recipe.startswith("calibrated"):
        calibrate(model, config, [architecture.batch(labels=True, seed=seed, size=8) for seed in range(2)])
    fused = get_peft_model(model, config)
    assert not hasattr(fused.get_base_model(), "_mlp_fusion_calibration")  # used, hence freed
    return fused, config


@pytest.mark.common
@every_recipe
def test_trained_saved_reloaded_and_merged(architecture, recipe, tmp_path):
    fused, config = make(architecture, recipe)
    before = logits(fused, architecture)
    assert torch.isfinite(before).all()
    train(fused, architecture)
    expected = logits(fused, architecture)
    assert not torch.equal(before, expected)
    fused.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(architecture.make(), tmp_path / "adapter")
    assert torch.equal(logits(reloaded, architecture), expected)
    assert reloaded.peft_config["default"].fused_by == config.fused_by
    merged = fused.merge_and_unload()
    assert relative(logits(merged, architecture), expected) < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    stock = type(merged).from_pretrained(tmp_path / "merged")
    assert relative(logits(stock, architecture), expected) < 1e-4


@every_recipe
def test_full_width_is_the_original(architecture, recipe):
    fused, _ = make(architecture, recipe, ratio=1.0)
    assert relative(logits(fused, architecture), logits(architecture.make(), architecture)) < 1e-4


@every
def test_calibration_brings_the_ffns_outputs_closer(architecture):
    as_published = get_peft_model(architecture.make(), half(architecture))
    calibrated, _ = make(architecture, "calibrated")
    data = [architecture.batch(labels=True, seed=seed, size=8) for seed in range(4)]
    errors = []
    for model in (calibrated, as_published):
        report = fidelity(model, data, sequences=1)
        errors.append(sum(ffn.output.relative for ffn in report.ffns))
    assert errors[0] < errors[1]


def test_svd_has_no_more_parameters_than_fusion():
    bert = BY_NAME["bert"]
    counts = [
        sum(p.numel() for n, p in get_peft_model(bert.make(), config).named_parameters() if "mlp_fusion" in n)
        for config in (FusionConfig(ratio=0.5), FusionConfig(ratio=0.5, method="svd"))
    ]
    assert 0.9 * counts[0] < counts[1] < 1.1 * counts[0]  # the full-width bias stays


def test_saved_configuration_says_what_auto_came_to():
    fused, config = make(BY_NAME["llama"], "calibrated")
    assert (config.kernel, config.scale) == ("auto", "auto")
    assert config.fused_by == {
        "method": "fusion",
        "kernel": "fisher",
        "representative": "neuron",
        "refit": "ridge",
        "scale": "ntk",
        "calibration": "16 sequences of data",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": "outputs"}, r'`kernel="outputs"` needs to know .* call `calibrate\(model, config, dataloader\)`'),
        ({"kernel": "fisher"}, '`kernel="fisher"` needs to know'),
        ({"kernel": "ntk"}, '`kernel="ntk"` needs'),
        ({"refit": "ridge"}, '`refit="ridge"` needs'),
        ({"scale": "ntk"}, '`scale="ntk"` needs'),
        (
            {"method": "sketch", "refit": "ridge"},
            '`refit="ridge"` works with `method` fusion and pruning, but got "sketch"',
        ),
        ({"method": "svd", "scale": "counts"}, '`scale="counts"` works with `method` fusion, but got "svd"'),
        ({"method": "sketch", "keep_neurons": 32}, "`keep` must be 0 to 31 for a width of 32, but got 32"),
    ],
)
def test_recipes_that_cannot_be(settings, message, unchanged):
    model = BY_NAME["bert"].make()
    check = unchanged(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, FusionConfig(ratio=0.5, **settings))
    check()
