"""The Fisher information of what every FFN puts out: which of its errors the model's predictions would show."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .fidelity.outputs import main_output, padding_mask, run_whole
from .fidelity.pair import Side
from .fusing.statistics import FFNStatistics
from .gradients import Batch, gradients_of_sentence
from .plan import PlannedFFN
from .progress import progress


def add_fisher(
    model: nn.Module,
    planned: Sequence[PlannedFFN],
    sentences: Sequence[Batch],
    statistics: Mapping[str, FFNStatistics],
    seed: int,
) -> None:
    """Adds to the statistics of every FFN F = E[d d^T]; nothing, with a warning, where the model has no gradients.

    d is the gradient, by what the FFN puts out at a token, of the log-likelihood of outputs that are drawn from the
    model itself; no labels are needed. Memory: the graph of one sentence, and 4 * out_dim ** 2 bytes an FFN.

    Args:
        model: the model in eval mode, showing its original FFNs.
        planned: the FFNs.
        sentences: batches of one sentence each.
        statistics: FFN name -> what calibration found out about it.
        seed: of the draws.
    """
    side = Side(model, [p.ffn for p in planned], fused=False)
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}

    def likelihood(batch: Batch) -> Tensor:
        return drawn_likelihood(side, batch, generator)

    try:
        for sentence in progress(sentences, "Taking gradients of predictions"):
            found = gradients_of_sentence(planned, sentence, side.decodes, likelihood)
            for name, (_, gradients) in found.items():
                gradients = gradients.float()
                sums[name] = torch.addmm(sums.get(name, gradients.new_zeros(())), gradients.T, gradients)
        if not all(bool(total.isfinite().all()) for total in sums.values()):
            raise ValueError("gradients are not finite")
    except Exception as error:  # whatever a model cannot do, neurons can be compared without it
        warnings.warn(
            f"No gradients could be taken through {type(model).__name__}, so its neurons are compared without them: "
            f"{type(error).__name__}: {error}",
            stacklevel=3,
        )
        return
    for name, total in sums.items():
        statistics[name].fisher = total


def drawn_likelihood(side: Side, batch: Batch, generator: torch.Generator) -> Tensor:
    """The mean log-likelihood, over a batch's tokens, of outputs that are drawn from the model itself.

    A language model's output is a token for each position. Any other head is mostly new and sees few directions: its
    model's output is taken to be the last hidden state plus Gaussian noise of unit variance.

    Args:
        side: the network whose outputs they are.
        batch: its inputs.
        generator: on the CPU, so that the draws are the same on every device.

    Returns:
        Tensor without dimensions, to be differentiated; the draws are constants.
    """
    hidden, output = run_whole(side, batch)
    logits = getattr(output, "logits", None)
    speaks = logits is not None and logits.dim() > 2 and (hidden is None or logits.shape[-1] > hidden.shape[-1])
    value = logits if speaks else hidden if hidden is not None else main_output(output)
    assert value is not None
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    likelihood = _categorical(value, generator) if speaks else _gaussian(value, generator)
    mask = padding_mask(batch, value.shape, side.decodes)
    return likelihood.mean() if mask is None else likelihood[mask.to(likelihood.device)].mean()


def _categorical(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The log-likelihood of a class drawn at every position: maps (..., classes) to (...)."""
    log_probabilities = logits.log_softmax(-1)
    uniform = torch.rand(logits.shape[:-1], generator=generator).to(logits)
    below = log_probabilities.detach().exp().cumsum(-1) < uniform.unsqueeze(-1)
    drawn = below.sum(-1).clamp(max=logits.shape[-1] - 1)
    return log_probabilities.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)


def _gaussian(mean: Tensor, generator: torch.Generator) -> Tensor:
    """The log-likelihood, up to a constant, of a vector drawn around every mean: maps (..., dim) to (...)."""
    drawn = mean.detach() + torch.randn(mean.shape, generator=generator).to(mean)
    return -0.5 * (drawn - mean).square().sum(-1)
