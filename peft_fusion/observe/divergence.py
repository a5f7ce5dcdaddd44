"""How far what a model predicts is from what another does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CPU_CHUNK, CHUNK = 2**21, 2**26
"""Logits that are worked on at once. On a CPU a few rows: fewer would leave its cores waiting for each other."""


def kl_divergences(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the predictions at every position, in nats.

    No more than some rows are ever held in float32. If `student` requires a gradient, that by its logits is computed at
    once and written over `teacher`, so that it takes no memory of its own.

    Args:
        student: logits of shape (positions, classes).
        teacher: the same of the model that is right; overwritten if `student` requires a gradient.

    Returns:
        Float32 tensor of shape (positions,), differentiable by `student`, once.
    """
    divergences: Tensor = _KL.apply(student, teacher)
    return divergences


class _KL(torch.autograd.Function):
    """The gradient of KL(p || softmax(s)) by s is softmax(s) - p."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        divergences = torch.empty(len(student), dtype=torch.float32, device=student.device)
        differentiated = ctx.needs_input_grad[0]
        gradient = teacher if teacher.dtype == student.dtype else torch.empty_like(student)
        size = max(1, (CPU_CHUNK if student.device.type == "cpu" else CHUNK) // max(1, student.shape[-1]))
        for start in range(0, len(student), size):
            rows = slice(start, start + size)
            ours = student[rows].float().log_softmax(-1)
            theirs = teacher[rows].to(ours).log_softmax(-1)
            right = theirs.exp()
            torch.sum(theirs.sub_(ours).mul_(right), -1, out=divergences[rows])
            if differentiated:
                gradient[rows] = ours.exp_().sub_(right)
        if differentiated:
            ctx.save_for_backward(gradient)
        return divergences

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(upstream.unsqueeze(-1).to(gradient)), None
