"""What `FusionConfig` accepts and refuses, and what it writes."""

from __future__ import annotations

import json

import pytest
from peft import PeftConfig

from peft_fusion import FusionConfig


@pytest.mark.parametrize("ratio", [0, 0.0, -0.5, 1.01, float("nan"), float("inf"), "half", None, True])
def test_bad_ratio(ratio):
    with pytest.raises(ValueError, match="`ratio` must be a number above 0 and at most 1"):
        FusionConfig(ratio=ratio)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("intermediate_size", 0),
        ("intermediate_size", -8),
        ("intermediate_size", 12.0),
        ("multiple_of", 0),
        ("n_init", 0),
        ("keep_neurons", -1),
        ("keep_neurons", True),
        ("max_iter", 1.5),
        ("seed", "0"),
        ("seed", True),
        ("width_pattern", [1]),
        ("width_pattern", {"mlp": 0}),
        ("width_pattern", {"mlp": 1.5}),
        ("width_pattern", {"mlp": True}),
        ("layers_to_transform", -1),
        ("layers_to_transform", [0, "1"]),
        ("method", "wanda"),
        ("scale", "sqrt"),
    ],
)
def test_bad_values_name_their_field(field, value):
    with pytest.raises(ValueError, match=f"`{field}"):
        FusionConfig(**{field: value})


def test_an_integer_one_is_no_width():
    """`ratio=1` is full width, so 1 in a pattern must not be one neuron."""
    with pytest.raises(ValueError, match=r"`width_pattern\['mlp'\]` is 1, one neuron.* Write 1.0 for full width"):
        FusionConfig(width_pattern={"mlp": 1})
    assert FusionConfig(width_pattern={"mlp": 1.0, "fc": 2}).width_pattern == {"mlp": 1.0, "fc": 2}
    assert FusionConfig(width_pattern={"mlp": 1}, fused=True).fused  # one that was saved before goes on loading


def test_layers_pattern_needs_layers():
    with pytest.raises(ValueError, match="`layers_pattern` counts the layers for `layers_to_transform`"):
        FusionConfig(layers_pattern="layers")


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match="fusion"):
        FusionConfig(method="nosuch")


def test_saved_config_says_that_it_is_fused(tmp_path):
    config = FusionConfig(ratio=0.5, target_modules={"b", "a"}, task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    assert not config.fused
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fused"] is True
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, FusionConfig) and loaded.fused
    assert (loaded.ratio, loaded.target_modules) == (0.5, ["a", "b"])
