"""KL divergences: the values and gradients of torch's own, in one pass and without memory of its own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

from peft_fusion.observe import divergence
from peft_fusion.observe.divergence import kl_divergences


def logits(seed: int, classes: int = 50) -> torch.Tensor:
    return 3 * torch.randn(7, classes, generator=torch.Generator().manual_seed(seed))


def by_torch(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("chunk", [1, 100, 2**18])
def test_values_and_gradients(chunk, monkeypatch):
    monkeypatch.setattr(divergence, "CPU_CHUNK", chunk)
    student, teacher = logits(0).requires_grad_(), logits(1)
    weight = torch.linspace(0, 1, 7)
    expected = by_torch(student, teacher)
    (right,) = torch.autograd.grad((expected * weight).sum(), student)
    found = kl_divergences(student, teacher.clone())
    (gradient,) = torch.autograd.grad((found * weight).sum(), student)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, right)


def test_it_takes_the_teachers_memory_for_the_gradient():
    student, teacher = logits(0).requires_grad_(), logits(1)
    loss = kl_divergences(student, teacher).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.data_ptr() == teacher.data_ptr()


def test_without_gradients_nothing_is_overwritten():
    student, teacher = logits(0), logits(1)
    before = student.clone(), teacher.clone()
    kl_divergences(student, teacher)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


def test_half_precision_and_equal_predictions():
    student, teacher = logits(0).bfloat16().requires_grad_(), logits(1).bfloat16()
    expected = by_torch(student.float(), teacher.float())
    found = kl_divergences(student, teacher)
    torch.testing.assert_close(found, expected.detach())
    assert found.dtype == torch.float32
    assert torch.autograd.grad(found.sum(), student)[0].dtype == torch.bfloat16
    assert float(kl_divergences(student, student.detach().clone()).max()) < 1e-6
    assert kl_divergences(torch.empty(0, 5), torch.empty(0, 5)).shape == (0,)
