"""Which FFNs a sequential refit can refit: those in layers that run one by one and add what their FFN puts out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ffn import FFN, capture
from ..observe import ranks
from ..observe.batches import Batch, shortened, single_sequences, unlabelled
from ..observe.networks import Network
from ..observe.shared_layers import in_one_list
from ..observe.stretches import Stretches, passed_on
from ..tuner.plan import AnyPlanned
from .inputs import Inputs

TOLERANCE = 0.02
"""How far what a layer puts out may be from moving in proportion to what its FFN does, relative to it."""


@dataclass(frozen=True)
class Step:
    """An FFN that is refitted when its turn comes.

    Args:
        ffn: the FFN, a dense one.
        layer: the number of the layer that it is in.
        factor: how many times its layer adds what it puts out.
    """

    ffn: FFN
    layer: int
    factor: float


def steps_of(network: Network, narrowed: Sequence[AnyPlanned], inputs: Inputs) -> list[Step]:
    """The dense FFNs that become narrower, in the order of their layers; tried on the first sequence of each rank.

    Args:
        network: the original model, running, and all planned FFNs.
        narrowed: those that become narrower.
        inputs: what the model is calibrated on.

    Raises:
        ValueError: if there is none, or a layer cannot run by itself or does more with what its FFN puts out than to
            add it: where a norm comes behind the addition (BERT), or between FFN and addition (Gemma 2).
    """
    dense = [p.ffn for p in narrowed if isinstance(p.ffn, FFN)]
    if not narrowed:
        return []
    if not dense:
        raise _refused(network, "it refits dense FFNs, and none of those that become narrower is one")
    batch = shortened(unlabelled(next(single_sequences(inputs.batches[0])), network.is_encoder_decoder))
    stretches = Stretches.of(network, batch)
    if ranks.sum_of(stretches is not None) < ranks.world() or stretches is None:
        raise _refused(network, "its layers do not all run once, in their order, each on what the one before puts out")
    numbers = in_one_list(network.model, [ffn.projection_names[-1] for ffn in dense])[1]
    outputs = [None, *stretches.outputs(network, batch)]
    steps = []
    for layer, ffn in sorted(zip(numbers, dense, strict=True), key=lambda found: found[0]):
        own = ranks.together(partial(_factor, network, stretches, outputs, layer, ffn, batch))
        factor = ranks.sum_of(own) / ranks.world()
        if not factor > 0:
            raise _refused(network, f"the layer of {ffn.name!r} does more with what its FFN puts out than to add it")
        steps.append(Step(ffn, layer, factor))
    return steps


def _factor(
    network: Network, stretches: Stretches, outputs: Sequence[Any], layer: int, ffn: FFN, batch: Batch
) -> float:
    """How many times a layer adds what its FFN puts out; NaN if it does anything else with it.

    The FFN puts out nothing, then noise as large as what the layer passes on, of another size at every token: behind a
    norm, wherever it is, the difference is not in proportion to that.
    """
    expected = passed_on(outputs[layer + 1])
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    sizes = torch.linspace(0.25, 2.0, expected.shape[:-1].numel()).view(*expected.shape[:-1], 1)
    pushed = (noise * sizes).to(expected) * expected.float().std().to(expected)
    found: list[Tensor] = []
    for put_out in (torch.zeros_like(pushed), pushed):
        calls: list[torch.Size] = []

        def replace(name: str, y: Tensor, put_out: Tensor = put_out, calls: list[torch.Size] = calls) -> Tensor:
            calls.append(y.shape)
            return put_out.view(y.shape) if y.numel() == put_out.numel() else y

        with (
            torch.no_grad(),
            capture([ffn], outputs=replace),
            stretches.running(layer, layer + 1, outputs[layer]) as noted,
        ):
            network(batch, logits=False)
        if len(calls) != 1 or calls[0].numel() != expected.numel() or calls[0][-1] != expected.shape[-1]:
            return float("nan")
        found.append(passed_on(noted[layer]).float())
    moved, by = found[1] - found[0], pushed.float()
    factor = float((moved * by).sum() / by.square().sum())
    return factor if float((moved - factor * by).norm()) <= TOLERANCE * abs(factor) * float(by.norm()) else float("nan")


def _refused(network: Network, why: str) -> ValueError:
    return ValueError(
        f'`refit="sequential"` cannot be used with this {type(network.model).__name__}: {why}. Leave `refit` at "auto" '
        'or "ridge", which fit each FFN by itself.'
    )
