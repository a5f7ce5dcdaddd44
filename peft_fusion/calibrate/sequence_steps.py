"""Which FFNs a sequential refit can refit: those in layers that run one by one and add what their FFN puts out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ffn import FFN, capture
from ..observe import ranks
from ..observe.batches import Batch, shortened, single_sequences, unlabelled
from ..observe.networks import Network
from ..observe.shared_layers import in_one_list
from ..observe.stretches import Stretches
from ..observe.sums import added_up, ends_with
from ..tuner.plan import AnyPlanned
from .inputs import Inputs

TOLERANCE = 0.02
"""How far a layer's sum may be from moving in proportion to what its FFN puts out, relative to it."""


@dataclass(frozen=True)
class Step:
    """An FFN that is refitted when its turn comes.

    Args:
        ffn: the FFN, a dense one.
        layer: the number of the layer that it is in.
        factor: how many times its layer adds what it puts out.
        norm: what the layer ends with, if it adds up in front of that.
    """

    ffn: FFN
    layer: int
    factor: float
    norm: nn.Module | None


def steps_of(network: Network, narrowed: Sequence[AnyPlanned], inputs: Inputs) -> list[Step]:
    """The dense FFNs that become narrower, in the order of their layers; tried on the first sequence of each rank.

    Args:
        network: the original model, running, and all planned FFNs.
        narrowed: those that become narrower.
        inputs: what the model is calibrated on.

    Raises:
        ValueError: if there is none, or a layer cannot run by itself or does more with what its FFN puts out than to
            add it, before it passes it on or ends in a norm: where one comes between FFN and addition (Gemma 2).
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
        trial = _Trial(network, stretches, batch, layer, ffn, outputs[layer])
        norm, factor = None, trial.factor(None)
        if not factor > 0 and (norm := trial.norm()) is not None:
            factor = trial.factor(norm)
        if not factor > 0:
            raise _refused(network, f"the layer of {ffn.name!r} does more with what its FFN puts out than to add it")
        steps.append(Step(ffn, layer, factor, norm))
    return steps


@dataclass(frozen=True)
class _Trial:
    """A layer by itself, over one sequence of each rank.

    Args:
        network: the original model, running.
        stretches: its layers.
        batch: the sequence.
        layer: the layer's number.
        ffn: an FFN in it.
        given: what the layer before puts out.
    """

    network: Network
    stretches: Stretches
    batch: Batch
    layer: int
    ffn: FFN
    given: Any

    def norm(self) -> nn.Module | None:
        """What the layer ends with, if on every rank that makes what it passes on of one tensor."""
        found = ranks.together(self._own_norm)
        return found if ranks.sum_of(found is not None) == ranks.world() else None

    def _own_norm(self) -> nn.Module | None:
        with ends_with(self.stretches.layers[self.layer]) as found:
            return found(self._run())

    def factor(self, norm: nn.Module | None) -> float:
        """How many times a layer adds what its FFN puts out; NaN if it does anything else with it.

        The FFN puts out nothing, then noise as large as what is added to, of another size at every token: behind a
        norm, wherever it is, the difference is not in proportion to that.

        Args:
            norm: in front of which to look; None: at what the layer passes on.
        """
        return ranks.sum_of(ranks.together(partial(self._own_factor, norm))) / ranks.world()

    def _own_factor(self, norm: nn.Module | None) -> float:
        with added_up(norm) as sums:
            expected = sums(self._run())
        noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
        sizes = torch.linspace(0.25, 2.0, expected.shape[:-1].numel()).view(*expected.shape[:-1], 1)
        pushed = (noise * sizes).to(expected) * expected.float().std().to(expected)
        nothing, something = self._sum(torch.zeros_like(pushed), norm), self._sum(pushed, norm)
        if nothing is None or something is None:
            return float("nan")
        moved, by = something - nothing, pushed.float()
        factor = float((moved * by).sum() / by.square().sum())
        apart = float((moved - factor * by).norm())
        return factor if apart <= TOLERANCE * abs(factor) * float(by.norm()) else float("nan")

    def _sum(self, put_out: Tensor, norm: nn.Module | None) -> Tensor | None:
        """The layer's sum if that is what the FFN puts out; None if the FFN puts out something of another shape."""
        calls: list[torch.Size] = []

        def replace(name: str, y: Tensor) -> Tensor:
            calls.append(y.shape)
            return put_out.view(y.shape) if y.numel() == put_out.numel() else y

        with capture([self.ffn], outputs=replace), added_up(norm) as sums:
            found = sums(self._run()).float()
        as_expected = len(calls) == 1 and calls[0].numel() == put_out.numel() and calls[0][-1] == put_out.shape[-1]
        return found if as_expected else None

    def _run(self) -> Any:
        """What the layer puts out."""
        with torch.no_grad(), self.stretches.running(self.layer, self.layer + 1, self.given) as noted:
            self.network(self.batch, logits=False)
        return noted[self.layer]


def _refused(network: Network, why: str) -> ValueError:
    return ValueError(
        f'`refit="sequential"` cannot be used with this {type(network.model).__name__}: {why}. Leave `refit` at "auto" '
        'or "ridge", which fit each FFN by itself.'
    )
