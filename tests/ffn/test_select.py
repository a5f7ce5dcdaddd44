"""Which FFNs a configuration means, and how narrow each becomes."""

from __future__ import annotations

import pytest
from architectures import ARCHITECTURES, BY_NAME

from peft_fusion.ffn import Selection, find_ffns, select_ffns, target_widths


def chosen(name: str, **selection) -> list[str]:
    return [ffn.name for ffn in select_ffns(find_ffns(BY_NAME[name].make()), Selection(**selection))]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_every_selector_works_with_every_layout(architecture):
    ffns = find_ffns(architecture.make())
    names = [ffn.name for ffn in ffns]
    assert len(names) == architecture.ffns and {ffn.width for ffn in ffns} == {architecture.width}

    def select(**selection) -> list[str]:
        return [ffn.name for ffn in select_ffns(ffns, Selection(**selection))]

    def in_layer(index: int) -> list[str]:
        return [name for name in names if next(p for p in name.split(".") if p.isdigit()) == str(index)]

    paths = ffns[0].paths
    assert select() == names
    assert select(target_modules=list(paths)) == names  # by all projections
    assert select(target_modules=[names[1]]) == [names[1]]  # by the FFN itself
    assert select(target_modules=rf"[^0-9]*\.1\..*({'|'.join(paths)})".replace(".dense", r"\.dense")) == in_layer(1)
    assert select(layers_to_transform=[1]) == in_layer(1)
    assert select(layers_to_transform=0) == in_layer(0)
    assert select(exclude_modules=[names[0]]) == names[1:]
    pattern = names[0].split(".")[next(i for i, p in enumerate(names[0].split(".")) if p.isdigit()) - 1]
    assert select(layers_to_transform=[1], layers_pattern=pattern) == in_layer(1)
    widths = target_widths(ffns, 0.5, None, {names[1].replace(".", r"\."): 24}, 8)
    assert widths[names[1]] == 24
    assert all(widths[name] == architecture.width // 2 for name in names if name != names[1])


def test_projections_outside_ffns_may_share_a_suffix():
    assert len(chosen("bert", target_modules=["intermediate.dense", "output.dense"])) == 3


def test_ffns_inside_modules_to_save_are_left_alone():
    assert chosen("llama", modules_to_save=["layers.0"]) == ["model.layers.1.mlp", "model.layers.2.mlp"]


def test_nested_numbers_count_the_first():
    names = chosen("t5", layers_to_transform=[1])
    assert names == ["encoder.block.1.layer.1.DenseReluDense", "decoder.block.1.layer.2.DenseReluDense"]


@pytest.mark.parametrize(
    ("ratio", "multiple_of", "width"),
    [(0.25, 8, 16), (0.26, 8, 24), (0.01, 8, 8), (1.0, 8, 64), (0.9, 48, 64), (0.3, 1, 20), (0.01, 100, 64)],
)
def test_ratios_are_rounded_up_and_never_above_full_width(ratio, multiple_of, width):
    ffns = find_ffns(BY_NAME["llama"].make())
    assert set(target_widths(ffns, ratio, None, {}, multiple_of).values()) == {width}


def test_precedence_of_widths():
    ffns = find_ffns(BY_NAME["llama"].make())
    widths = target_widths(ffns, 0.25, 20, {r"layers\.0\.mlp": 1.0, "layers.1.mlp.up_proj": 12}, 8)
    assert list(widths.values()) == [64, 12, 20]
