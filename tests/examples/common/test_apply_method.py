"""Methods by name."""

from __future__ import annotations

from peft_fusion import FusionConfig


def test_the_examples_name_the_packages_methods(example):
    named = example("common.apply_method").FUSED
    described = FusionConfig.__dataclass_fields__["method"].metadata["help"]
    assert [FusionConfig(method=name).method for name in named] == list(named)
    assert all(f"'{name}'" in described for name in named) and described.count("'") == 2 * len(named)
