"""What calibrating, fusing, training and distilling a model will take: bytes and seconds, from its config alone.

Bytes are those of tensors, seconds are operations divided by how many this machine does in a second; what is not
counted, attention's scores and reading from disk among it, makes both a lower bound. `docs/` compares them with runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..calibrate.inputs import OWN_SEQUENCES
from ..calibrate.memory import bound, making
from ..ffn import AnyFFN, Experts, find_all, networks_of, parameters_of
from ..fusing.gradient_kernels import BLOCK_MEMORY
from ..fusing.statistics import SAMPLE_TOKENS
from ..observe.batches import MOST_LENGTH
from ..observe.fisher import METRIC_SEQUENCES
from ..observe.networks import Network
from ..observe.own_inputs import OWN_LENGTH
from ..observe.passes import sequences_at_once

SHARD = 5 * 10**9
CLUSTERING = 4300.0
"""Operations per pair of neurons that clustering takes the time of, beside the Gram matrix (docs/results.md)."""

ELIMINATION = 3.0
"""Products per neuron cubed that an inverse and its updates take the time of (docs/results.md)."""

CHOICES, FITS = 3, 7
"""Of an FFN's neurons, and of its out-projection: one strength of the ridge for each choice, and more for the best."""

BATCH = 1024
"""Tokens of a forward pass, and of a step of training."""

DISTILLED = 2**16
"""Tokens of a distillation."""


@dataclass(frozen=True)
class Cost:
    """What a step takes.

    Args:
        step: its name.
        bytes: beyond the model's weights.
        seconds: of all of it; of training one step of `BATCH` tokens.
    """

    step: str
    bytes: int
    seconds: float


def plan(model: Any, ratio: float, ffns_per_pass: int | None, rate: float) -> list[Cost]:
    """The costs of fusing every FFN of a model to a share of its neurons.

    Args:
        model: on the meta device.
        ratio: the share.
        ffns_per_pass: of `calibrate`; None: all at once.
        rate: operations a second, of products in the model's dtype.

    Returns:
        Of fusing by weights, calibrating, training and distilling. The command line fuses by weights FFN by FFN, and
        leaves the model's own weights on disk; routed experts are fused in memory.
    """
    ffns, size = find_all(model), element_size(model)
    full = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameters_of(ffn, round(ratio * ffn.width)) for ffn in ffns)
    computing = _active(model, ffns, 1.0)
    narrow = _active(model, ffns, ratio)
    work = max(map(making, ffns), default=0)
    by_itself = not any(isinstance(ffn, Experts) for ffn in ffns)
    result = min(SHARD, size * (full - sum(map(parameters_of, ffns)) + trained)) if by_itself else size * trained
    costs = [Cost("fuse by weights", work + result, _clustering(ffns) / rate)]
    at_once = min(ffns_per_pass or len(ffns), len(ffns))
    held = bound(ffns, at_once) + _activations(model, ffns) + size * trained
    costs.append(Cost("calibrate", held, _calibrating(model, ffns, ratio, at_once, computing) / rate))
    states = trained * (size + 2 * size)  # gradients, and two of AdamW
    step = BATCH * (4 * narrow + 2 * trained)
    costs.append(Cost("train, a step", size * trained + states, step / rate))
    steps = DISTILLED / BATCH * (step + BATCH * 2 * computing)
    costs.append(Cost("distill", size * trained + states + _logits(model), (steps + DISTILLED * 2 * computing) / rate))
    return costs


def operations_a_second(dtype: torch.dtype) -> float:
    """How many floating-point operations this machine does in a second, in products of 1024 x 1024 matrices."""
    a = torch.ones(1024, 1024, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best


def element_size(model: Any) -> int:
    """Bytes of a number in the dtype that a model's config names."""
    return torch.empty(0, dtype=getattr(model.config, "dtype", None) or torch.float32).element_size()


def _active(model: Any, ffns: Sequence[AnyFFN], ratio: float) -> float:
    """Parameters that a token is multiplied with, at a share of the neurons: no embeddings, and of experts some."""
    used = sum(parameter.numel() for parameter in model.parameters())
    embeddings = model.get_input_embeddings()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = getattr(model.config, "tie_word_embeddings", False) and head is not None
    used -= 0 if tied else sum(parameter.numel() for parameter in embeddings.parameters())
    for ffn in ffns:
        used += _share(model, ffn) * parameters_of(ffn, round(ratio * ffn.width)) - parameters_of(ffn)
    return used


def _share(model: Any, ffn: AnyFFN) -> float:
    """Of an FFN's networks, the share that a token goes through: of experts those it is routed to."""
    if not isinstance(ffn, Experts):
        return 1.0
    return float(getattr(model.config.get_text_config(), "num_experts_per_tok", 1)) / ffn.count


def _clustering(ffns: Sequence[AnyFFN]) -> float:
    """Operations of clustering by weights: half of a Gram matrix of all rows, and the search."""
    return sum(parameters_of(ffn) * ffn.width + len(networks_of(ffn)) * CLUSTERING * ffn.width**2 for ffn in ffns)


def _calibrating(model: Any, ffns: Sequence[AnyFFN], ratio: float, at_once: int, computing: float) -> float:
    """Operations of a calibration on the model's own text, once that is there."""
    groups, tokens = -(-len(ffns) // at_once), OWN_SEQUENCES * OWN_LENGTH
    part = (groups + 1) / (2 * groups)  # of the layers, on average those up to a group's last, or down to its first
    gradients = (1 + 3 * part) * METRIC_SEQUENCES * MOST_LENGTH  # forward, and of a part again, and twice back
    passes = groups * 2 * computing * (part * tokens + gradients)
    of_ffns = 0.0
    for ffn in ffns:
        n, kept, count = ffn.width, ratio * ffn.width, len(networks_of(ffn))
        products = count * _share(model, ffn) * 0.75 * tokens * n**2  # of three tokens in four, one triangle
        search = ffn.out_dim * n**2 + CLUSTERING * n**2 + ELIMINATION * n**3
        of_ffns += products + count * (search + _refitting(n, kept, ffn.out_dim))
    return passes + of_ffns


def _refitting(n: int, kept: float, out_dim: int) -> float:
    """Operations of fitting some choices of neurons; the solutions in float64, which is half as fast."""
    solution = 2 * (kept**3 / 3 + 2 * kept**2 * out_dim)
    judged = 2 * SAMPLE_TOKENS * kept * out_dim
    return FITS * (solution + judged) + CHOICES * 2 * n * kept * out_dim


def _activations(model: Any, ffns: Sequence[AnyFFN]) -> int:
    """Bytes of one layer over a batch, of gradients' blocks, and of logits, twice."""
    layer = max(BATCH * (4 * ffn.width + 8 * ffn.in_dim) for ffn in ffns)
    tokens = sequences_at_once(Network(model, ffns, fused=False)) * MOST_LENGTH
    return element_size(model) * layer + BLOCK_MEMORY + _logits(model) * tokens // BATCH


def _logits(model: Any) -> int:
    """Bytes of the logits of a batch, in float32, twice."""
    return 2 * 4 * BATCH * int(getattr(model.config.get_text_config(), "vocab_size", 0) or 0)
