"""The paper's layer-wise task-specific tuning: hidden states of the fused model follow those of the original."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..observe import ranks
from ..observe.batches import Batch, check_batch, padding_mask, unlabelled
from ..observe.networks import Network, active_narrow, fusion_layers
from ..progress import progress

SIDES = (("hidden_states", False), ("encoder_hidden_states", False), ("decoder_hidden_states", True))


def tune_hidden_states(
    original: Network,
    fused: Network,
    dataloader: Iterable[Batch],
    learning_rate: float,
    steps: int | None,
    accelerator: Accelerator | None,
) -> dict[str, tuple[float, float]]:
    """Tunes the whole fused model; see `tune_layers`, objective "hidden_states"."""
    narrow = [m for layer in fusion_layers(fused.model) if (m := active_narrow(layer)) is not None]
    if not narrow:
        raise ValueError("Only a model with an active fusion adapter can be tuned; this one has no fused weights.")
    parameters = [parameter for module in narrow for parameter in module.parameters()]
    errors: list[Tensor] = []  # on the device: to read one would make the host wait for it at every step
    with _kept_on_failure(parameters):
        adam = torch.optim.Adam(parameters, lr=learning_rate)
        for batch in _in_step(progress(dataloader, "Tuning hidden states"), steps):
            check_batch(batch)
            inputs = unlabelled(batch, fused.is_encoder_decoder)
            with original.running(), torch.no_grad(), _precision(accelerator):
                expected = _hidden_states(original(inputs, hidden_states=True))
            errors.append(_step(fused, inputs, expected, parameters, adam, accelerator))
    if not errors:
        raise ValueError("The dataloader yields no batch: give one that can be iterated anew, with at least one batch.")
    losses = torch.stack(errors).tolist()
    tenth = max(1, len(losses) // 10)
    return {"hidden_states": (sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth)}


def _in_step(batches: Iterable[Batch], steps: int | None) -> Iterator[Batch]:
    """So many batches, or all; where there are several ranks, as long as each of them has one."""
    iterator = iter(batches)
    for _ in range(steps) if steps is not None else count():
        batch = next(iterator, None)
        if ranks.sum_of(batch is None):
            return
        assert batch is not None
        yield batch


@contextmanager
def _kept_on_failure(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Gradients are as they were afterwards, and weights are if anything, an interrupt included, ends the block."""
    gradients = [parameter.grad for parameter in parameters]
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        raise
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def _step(
    fused: Network,
    batch: Batch,
    expected: list[tuple[Tensor, bool]],
    parameters: list[nn.Parameter],
    adam: torch.optim.Adam,
    accelerator: Accelerator | None,
) -> Tensor:
    """One step of Adam towards the original's hidden states; returns their mean squared error before it."""
    with fused.running():
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            with _precision(accelerator):
                found = _hidden_states(fused(batch, hidden_states=True))
            loss = hidden_state_error(found, expected, batch)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else _mean_over_ranks(gradient, accelerator)
        adam.step()
        adam.zero_grad()
    return loss.detach()


def _mean_over_ranks(gradient: Tensor, accelerator: Accelerator | None) -> Tensor:
    if accelerator is None:
        return ranks.sum_over_ranks(gradient) / ranks.world()
    mean: Tensor = accelerator.reduce(gradient, reduction="mean")
    return mean


def _precision(accelerator: Accelerator | None) -> AbstractContextManager:
    """The mixed precision that an accelerator stands for."""
    return nullcontext() if accelerator is None else accelerator.autocast()


def hidden_state_error(found: list[tuple[Tensor, bool]], expected: list[tuple[Tensor, bool]], batch: Batch) -> Tensor:
    """The mean squared error over layers, tokens that are not padding, and dimensions.

    Args:
        found: (hidden states of shape (batch, length, dim), whether they are a decoder's), layer by layer.
        expected: the same of the original.
        batch: the inputs, for their masks.
    """
    errors = []
    for (ours, decoder), (theirs, _) in zip(found, expected, strict=True):
        difference = (ours.float() - theirs.to(ours.device).float()).square().mean(-1)
        mask = padding_mask(batch, ours.shape, decoder)
        errors.append(difference.mean() if mask is None else _mean_of(difference, mask))
    return torch.stack(errors).mean()


def _mean_of(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of those that a mask names; what the others are, NaN say, does not matter."""
    mask = mask.to(values.device, non_blocking=True)
    return torch.where(mask, values, 0).sum() / mask.sum()


def _hidden_states(output: Any) -> list[tuple[Tensor, bool]]:
    """The hidden states after every layer (not the embeddings), of encoder and decoder where there are both.

    Raises:
        ValueError: if the model does not return them.
    """
    found: list[tuple[Tensor, bool]] = []
    for name, decoder in SIDES:
        states = getattr(output, name, None)
        if isinstance(states, (tuple, list)):
            found += [(state, decoder) for state in states[1:]]
    if not found:
        raise ValueError('The model returns no hidden states; use `objective="ffn"`, which needs none.')
    return found
