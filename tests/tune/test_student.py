"""How a narrow FFN learns from the original one."""

from __future__ import annotations

import pytest
import torch
from architectures import BY_NAME
from peft import get_peft_model

from peft_fusion import FusionConfig
from peft_fusion.observe.pair import pair
from peft_fusion.tune import student as student_module
from peft_fusion.tune.student import NOISE, Student, _lessons, fit


@pytest.fixture(params=["llama", "bert"])
def student(request) -> Student:
    fused = get_peft_model(BY_NAME[request.param].make(), FusionConfig(ratio=0.5))
    original, narrow = pair(fused, None)
    return Student(narrow.ffns[0], original.ffns[0], None)


def inputs(student: Student, tokens: int = 4000) -> torch.Tensor:
    dim = student.weights[0].shape[1]
    generator = torch.Generator().manual_seed(0)
    mixing = torch.linspace(0.5, 2, dim).diag() + torch.randn(dim, dim, generator=generator) / dim**0.5
    return torch.randn(tokens, dim, generator=generator) @ mixing + 3


def test_half_of_a_lesson_was_met_and_half_is_near_and_the_teacher_is_right_on_both(student):
    x = inputs(student)
    y = student.taught(x)
    met, near, errors = [], [], []
    for given, told in _lessons(student, x, y, steps=20, seed=1):
        half = len(given) // 2
        met.append(torch.cdist(given[:half], x, compute_mode="donot_use_mm_for_euclid_dist").min(1).values)
        near.append(given[half:] - 3)
        errors.append((student.taught(given) - told).abs().max())
    assert torch.cat(met).max() == 0
    assert max(errors) < 1e-5
    expected = x.T.cov() * (1 + NOISE**2)  # independent noise of the same covariance adds to it
    assert (torch.cat(near).T.cov() - expected).norm() < 0.1 * expected.norm()


def test_damped_steps_are_shorter_where_gradients_are_small(student, monkeypatch):
    x, start = inputs(student, 600), [weight.detach().clone() for weight in student.weights]
    moves = {}
    for damping in (0.0, 1.0, 1e6):
        monkeypatch.setattr(student_module, "DAMPING", damping)
        for weight, value in zip(student.weights, start, strict=True):
            weight.data = value.clone()
        with torch.enable_grad():
            for _ in student_module._adam(student, x, 0.01, 1, 0):
                pass
        moved = (student.weights[0].detach() - start[0]).abs()
        moves[damping] = moved / moved.max()
    assert moves[0.0].median() > 0.99  # Adam's first step: all weights alike
    assert moves[1.0].median() < 0.9
    assert moves[1e6].median() < moves[1.0].median()


def test_inputs_near_those_that_were_met_are_learnt_too(student, monkeypatch):
    x = inputs(student, 256)
    near = x + 0.35 * (x[torch.randperm(256, generator=torch.Generator().manual_seed(9))] - x.flip(0))
    start = [weight.detach().clone() for weight in student.weights]
    errors = []
    for noise in (0.0, 0.7):
        monkeypatch.setattr(student_module, "NOISE", noise)
        for weight, value in zip(student.weights, start, strict=True):
            weight.data = value.clone()
        fit(student, x, 0.04, 150, 0)
        errors.append(student.error(near, student.taught(near)))
    assert errors[1] < errors[0]
