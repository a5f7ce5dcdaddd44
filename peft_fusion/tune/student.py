"""A narrow FFN as the student of the original one: how it learns to put out the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..ffn import FFN, run_ffn
from ..fusing.precision import fast_products
from ..observe.networks import active_narrow
from ..tuner.layer import FusionLayer

BATCH_TOKENS = 1024
CHECKS = 10  # how often the held-out error is looked at
HELD_OUT = 8  # one token in so many is held out

NOISE = 0.7
"""Half of the inputs are moved by noise of the inputs' own covariance, so many standard deviations of it.

The original FFN tells the right output there as well, so that tokens which were not collected are learnt from, too.
"""

DAMPING = 0.3
"""Adam's epsilon for a weight tensor, in root mean squares of its first gradient.

Weights of smaller gradients than usual, which are mostly noise, then move in proportion to them and not as far as all
others; a rate that learns far more in as many steps does not overfit.
"""


class Student:
    """A narrow FFN that learns: maps inputs (tokens, in_dim) to outputs in the metric's coordinates, in float32.

    It learns with weights of its own, and the model's stay as they are.

    Args:
        ffn: its projections, fusion layers or plain modules.
        teacher: the original FFN.
        metric_root: of the metric in which errors are measured, (out_dim, out_dim); None: the plain one.
    """

    def __init__(self, ffn: FFN, teacher: FFN, metric_root: Tensor | None) -> None:
        self.ffn, self.teacher, self.metric_root = ffn, teacher, metric_root
        modules = [narrow for layer in ffn.projections if (narrow := _narrow(layer)) is not None]
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        own = [
            {name: p.detach().float().clone().requires_grad_() for name, p in module.named_parameters()}
            for module in modules
        ]
        self.weights = [weight for named in own for weight in named.values()]
        self._projections = [partial(_called, module, named) for module, named in zip(modules, own, strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        """The products are in bfloat16 where it is fast.

        The rounding is far below what a narrow FFN misses, and the weights stay in float32.
        """
        with fast_products(x.device):
            y = run_ffn(self.ffn, self._projections, x.float()).float()
        return self._seen(y)

    @torch.no_grad()
    def taught(self, x: Tensor) -> Tensor:
        """What the original FFN puts out, in the same coordinates; x is in its dtype."""
        parts = [run_ffn(self.teacher, self.teacher.base_projections, part) for part in x.split(BATCH_TOKENS)]
        return self._seen(torch.cat(parts).float())

    def _seen(self, y: Tensor) -> Tensor:
        return y if self.metric_root is None else y @ self.metric_root

    @torch.no_grad()
    def error(self, x: Tensor, y: Tensor) -> float:
        """The relative squared error on inputs whose right outputs, in the metric's coordinates, are y."""
        return float((self(x) - y).square().sum() / y.square().sum().clamp(min=1e-30))


def fit(student: Student, x: Tensor, learning_rate: float, steps: int, seed: int) -> tuple[float, float]:
    """Fits a narrow FFN to what the original puts out.

    Args:
        student: the narrow FFN; its weights stay what they are unless it gets better on held-out tokens.
        x: inputs, shape (tokens, in_dim), in the original's dtype.
        learning_rate: of Adam, relative to the root mean square of each weight tensor.
        steps: Adam's steps.
        seed: of the order of tokens, and of the noise.

    Returns:
        The relative squared error on held-out tokens, before and after.
    """
    held_out = torch.arange(len(x), device=x.device) % HELD_OUT == HELD_OUT - 1
    test = (x[held_out], student.taught(x[held_out]))
    before = student.error(*test)
    best, kept = before, [weight.detach().clone() for weight in student.weights]
    with torch.enable_grad():
        for _ in _adam(student, x[~held_out], learning_rate, steps, seed):
            error = student.error(*test)
            if error < best:
                best, kept = error, [weight.detach().clone() for weight in student.weights]
    with torch.no_grad():
        for weight, value in zip(student.weights, kept, strict=True):
            weight.copy_(value)
    return before, best


def _adam(student: Student, x: Tensor, learning_rate: float, steps: int, seed: int) -> Iterator[None]:
    """Takes Adam's steps along a cosine, and stops now and then for a look at the held-out error."""
    sizes = [(p, learning_rate * float(p.detach().square().mean().sqrt())) for p in student.weights]
    adam = torch.optim.Adam([{"params": [parameter], "lr": rate} for parameter, rate in sizes if rate])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    y = student.taught(x)
    unit = y.square().mean()
    for step, (inputs, outputs) in enumerate(_lessons(student, x, y, steps, seed), 1):
        loss = (student(inputs) - outputs).square().mean() / unit
        adam.zero_grad()
        loss.backward()
        if step == 1:
            _damp(adam)
        adam.step()
        schedule.step()
        if step % max(1, steps // CHECKS) == 0 or step == steps:
            yield


def _lessons(student: Student, x: Tensor, y: Tensor, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of inputs (tokens, in_dim) and the outputs to learn; half of them are moved."""
    generator = torch.Generator().manual_seed(seed)
    size = max(1, min(BATCH_TOKENS, len(x)) // 2)
    for _ in range(steps):
        met, near, one, other = torch.randint(0, len(x), (4, size), generator=generator).to(x.device, non_blocking=True)
        moved = x[near] + NOISE / 2**0.5 * (x[one] - x[other])  # the difference of two has twice their covariance
        yield torch.cat([x[met], moved]), torch.cat([y[met], student.taught(moved)])


def _damp(adam: torch.optim.Adam) -> None:
    """Sets Adam's epsilon by the gradients that the parameters have."""
    for group in adam.param_groups:
        (parameter,) = group["params"]
        group["eps"] = max(DAMPING * float(parameter.grad.square().mean().sqrt()), group["eps"])


def _narrow(layer: nn.Module) -> nn.Module | None:
    return active_narrow(layer) if isinstance(layer, FusionLayer) else layer


def _called(module: nn.Module, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """A module's output with other weights than its own."""
    output: Tensor = functional_call(module, dict(weights), (x,))
    return output
