"""What options take, and what they refuse."""

from __future__ import annotations

import argparse

import pytest


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf"])
def test_a_rate_that_cannot_train_is_refused(example, text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number above 0"):
        example("common.command_line").rate(text)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("last-half", [2, 3, 4]),
        ("last-two-thirds", [1, 2, 3, 4]),
        ("1,3-4", [1, 3, 4]),
        ("0", [0]),
    ],
)
def test_layer_indices(example, text, layers):
    assert example("common.command_line").layer_indices(text, 5) == layers


@pytest.mark.parametrize("text", ["5", "3-7", "x", "", "-1", "4-2"])
def test_wrong_layers_are_refused(example, text):
    with pytest.raises(ValueError, match="--layers"):
        example("common.command_line").layer_indices(text, 5)
