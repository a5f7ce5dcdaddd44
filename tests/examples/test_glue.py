"""The GLUE example: its table, the paper's settings."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.fixture
def glue(example) -> ModuleType:
    pytest.importorskip("sklearn")
    return example("glue")


def test_table_has_mean_and_deviation(glue):
    task = glue.TaskData("t", ("accuracy",), ["a", "b"], [], {"test": []})
    runs = [{"test": {"accuracy": value}} for value in (0.5, 0.7)]
    assert glue.table(runs, task).splitlines()[-1].split() == ["accuracy", "0.600", "±", "0.141"]
    assert glue.table(runs[:1], task).splitlines()[-1].split() == ["accuracy", "0.500"]


def test_the_papers_settings(glue, example):
    options = glue.parse_arguments(["--preset", "paper"])
    assert (options.ratio, options.calibrate, options.batch_size, options.epochs) == (0.25, False, 32, 10)
    assert 1e-5 <= options.learning_rate <= 8e-5
    assert example("common.command_line").layer_indices(options.layers, 12) == list(range(4, 12))
    assert glue.training_steps(options, 1000) == 313  # 10 epochs of 31.25 batches
    assert options.settings == {
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-6,
        "weight_decay": 0.1,
        "lr_scheduler_type": "polynomial",
        "warmup_steps": 0.06,
    }


def test_what_is_given_beside_a_preset_wins(glue, example):
    arguments = ["--preset", "paper", "--steps", "7", "--ratio", "0.5", "--calibrate", "--learning-rate", "1e-5"]
    options = glue.parse_arguments(arguments)
    assert glue.training_steps(options, 1000) == 7
    assert (options.ratio, options.calibrate, options.learning_rate) == (0.5, True, 1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "svd", "--calibrate"], "--calibrate works with fusion and pruning, not with svd"),
        (["--method", "lora", "--tune-layers", "5"], "--tune-layers works on narrow FFNs"),
    ],
)
def test_options_that_would_be_ignored_are_refused(glue, arguments, message):
    with pytest.raises(ValueError, match=message):
        glue.parse_arguments(arguments)
