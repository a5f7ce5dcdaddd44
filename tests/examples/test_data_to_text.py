"""The data-to-text example: the paper's settings."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.fixture
def data_to_text(example) -> ModuleType:
    return example("data_to_text")


def test_the_papers_settings(data_to_text):
    options = data_to_text.parse_arguments(["--preset", "paper"])
    assert (options.ratio, options.layers, options.calibrate) == (0.25, "last-two-thirds", False)
    assert (options.batch_size, options.settings) == (8, {"weight_decay": 0.1})
    assert 2e-5 <= options.learning_rate <= 6e-5


def test_smoke_is_short_under_any_preset(data_to_text):
    options = data_to_text.parse_arguments(["--smoke", "--preset", "paper"])
    assert (options.steps, options.max_test, options.beams) == (3, 2, 1)
