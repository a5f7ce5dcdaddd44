"""The Fisher information of what every FFN puts out: which of its errors the model's predictions would show."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..progress import progress
from . import ranks
from .batches import Batch, batch_size, padding_mask, shortened, token_mask
from .gradients import gradients_of_sequence
from .networks import Network
from .outputs import predicted
from .passes import passes_of, sequences_at_once

METRIC_SEQUENCES = 64
"""Sequences that give F well enough.

What an FFN learns, or is chosen by, in the metric of a rougher one carries over to other text less well. Of SmolLM2's
FFNs F is 41 % off after 64 sequences of 64 tokens, against 68 % after 24 and 26 % after 160 (Frobenius norm).
"""

MAGNIFIED = 16.0

CHUNK = 2**19
"""Logits whose probabilities are worked out at once."""


def fisher_information(network: Network, sequences: Sequence[Batch], seed: int) -> dict[str, Tensor]:
    """F = E[d d^T] of every FFN and every expert over tokens, up to a factor that all of them share.

    d is the gradient, by what the FFN puts out at a token, of the log-likelihood of outputs that are drawn from the
    model itself; no labels are needed. Every token counts alike, however long its sequence is. Of several ranks each
    takes its own sequences, and all get the sum, that of one process with all of them. Memory: the graph of one layer
    over one sequence (over more, of one shape, where that is little beside the weights), its logits twice, and
    4 * out_dim ** 2 bytes an FFN.

    Args:
        network: the original model in eval mode, and its FFNs.
        sequences: batches of one sequence each.
        seed: of the draws.

    Returns:
        Name of a dense FFN or of an expert -> tensor of shape (out_dim, out_dim) in CPU memory.

    Raises:
        NoGradients: if the model has none, or they are not finite.
    """
    return {name: fisher.product for name, fisher in fisher_sums(network, sequences, seed).items()}


@dataclass
class FisherSum:
    """What the Fisher information of an FFN is made of.

    Args:
        product: the sum of d d^T, shape (out_dim, out_dim).
        tokens: over how many tokens.
    """

    product: Tensor
    tokens: int = 0


def fisher_sums(network: Network, sequences: Sequence[Batch], seed: int) -> dict[str, FisherSum]:
    """`fisher_information`, and of how many tokens it is: an expert may get few. Args and errors are the same."""

    def add_up() -> dict[str, FisherSum]:
        sums: dict[str, FisherSum] = {}
        met: Counter[int] = Counter()
        passes = passes_of([shortened(sequence) for sequence in sequences], sequences_at_once(network))
        left = iter(sequences)
        for joined in progress(passes, "Taking gradients of predictions"):
            draws = []
            for sequence in islice(left, batch_size(joined)):
                draws.append(draws_of(sequence, seed, met[key := _key(sequence, seed)]))
                met[key] += 1
            likelihood = partial(drawn_likelihood, network, draws=draws)
            for name, (_, gradients) in gradients_of_sequence(network, joined, likelihood, MAGNIFIED).items():
                d = gradients.float()
                found = sums.setdefault(name, FisherSum(d.new_zeros(d.shape[1], d.shape[1])))
                found.product.addmm_(d.T, d)
                found.tokens += len(d)
        return sums

    sums = ranks.together(add_up)
    return {
        name: FisherSum(ranks.sum_over_ranks(found.product), int(ranks.sum_of(found.tokens)))
        for name, found in sums.items()
    }


def draws_of(sequence: Batch, seed: int, repeats: int = 0) -> torch.Generator:
    """What is drawn for a sequence depends on what it holds, and not on its rank, its padding or the others.

    Args:
        sequence: a batch of one sequence.
        seed: of all draws.
        repeats: how often it came before.
    """
    return torch.Generator().manual_seed(_key(sequence, seed) + repeats)


def _key(sequence: Batch, seed: int) -> int:
    """A number for what a sequence holds without its padding."""
    key, mask = zlib.crc32(str(seed).encode()), token_mask(sequence, decoder=False)
    for name, value in sorted(sequence.items()):
        if isinstance(value, Tensor) and not name.endswith("attention_mask"):
            tokens = value[mask] if mask is not None and value.shape == mask.shape else value
            key = zlib.crc32(tokens.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), key)
    return key


def drawn_likelihood(network: Network, batch: Batch, draws: Sequence[torch.Generator]) -> Tensor:
    """The log-likelihood, summed over a batch's tokens, of outputs that are drawn from the model itself.

    A language model's output is a token for each position. That of any other model is taken to be its last hidden state
    plus Gaussian noise of unit variance.

    Args:
        network: the network whose outputs they are.
        batch: its inputs.
        draws: one for each of its sequences, on the CPU, so that they are the same on every device.

    Returns:
        Tensor without dimensions, to be differentiated; what is drawn is constant.
    """
    value, spoken = predicted(network, batch)
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    likelihood = _categorical(value, draws) if spoken else _gaussian(value, draws)
    mask = padding_mask(batch, value.shape, network.is_encoder_decoder)
    return likelihood.sum() if mask is None else likelihood[mask.to(likelihood.device)].sum()


def _drawn(draw: Callable[..., Tensor], shape: Sequence[int], draws: Sequence[torch.Generator]) -> Tensor:
    """Random numbers of a shape, its first dimension shared out among the draws."""
    return torch.cat([draw(shape[0] // len(draws), *shape[1:], generator=generator) for generator in draws])


def _categorical(logits: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
    """The log-likelihood of a class drawn at every position: maps (..., classes) to (...), differentiable once."""
    uniform = _drawn(torch.rand, logits.shape[:-1], draws).to(logits)
    likelihood: Tensor = _Categorical.apply(logits, uniform)
    return likelihood


class _Categorical(torch.autograd.Function):
    """The gradient of log p(drawn) by the logits is 1 at what is drawn, less p. Only that is as large as they are."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, uniform: Tensor) -> Tensor:
        classes = logits.shape[-1]
        likelihood = torch.empty_like(uniform)
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        flat = (logits.reshape(-1, classes), uniform.reshape(-1, 1), likelihood.view(-1, 1), gradient.view(-1, classes))
        parts = (tensor.split(max(1, CHUNK // classes)) for tensor in flat)
        for x, threshold, found, by_logits in zip(*parts, strict=True):
            log_probabilities = x.log_softmax(-1)
            torch.exp(log_probabilities, out=by_logits)
            drawn = (by_logits.cumsum(-1) < threshold).sum(-1, keepdim=True).clamp_(max=classes - 1)
            torch.gather(log_probabilities, -1, drawn, out=found)
            by_logits.neg_().scatter_add_(-1, drawn, torch.ones_like(found))
        ctx.save_for_backward(gradient)
        return likelihood

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(upstream.unsqueeze(-1)), None


def _gaussian(mean: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
    """The log-likelihood, up to a constant, of a vector drawn around every mean: maps (..., dim) to (...)."""
    drawn = mean.detach() + _drawn(torch.randn, mean.shape, draws).to(mean)
    return -0.5 * (drawn - mean).square().sum(-1)
