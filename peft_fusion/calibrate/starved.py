"""Experts that saw too few tokens: what stands in for what they would have told, and what is recorded of that.

The experts of a layer write into the same stream, so that what a layer's predictions show of one expert's errors is
much like what they show of another's: where an expert's own gradients are too few, those of all experts of its layer
are taken. What an expert computes inside is its own: where its tokens are too few, it is fused by its weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ffn import AnyFFN, Expert, Experts, OneFFN, networks_of
from ..fusing.statistics import FFNStatistics
from ..observe.fisher import FisherSum
from ..tuner.plan import AnyPlanned

FEWEST_TOKENS, FEWEST_HELD_OUT = 64, 16
"""An expert that saw fewer tokens to fit to, or fewer that are held out, is fused by its weights."""


@dataclass
class Starved:
    """Which experts saw too few tokens.

    Args:
        by_weights: names of those that are fused by their weights.
        by_layer: names of those of which errors are measured in the metric of all experts of their layer.
    """

    by_weights: set[str] = field(default_factory=set)
    by_layer: set[str] = field(default_factory=set)

    def note(self, ffns: Iterable[OneFFN], statistics: Mapping[str, FFNStatistics]) -> None:
        """Notes which of some FFNs are experts that saw too few tokens, by the statistics of all ranks."""
        for one in ffns:
            found = statistics[one.name]
            if isinstance(one, Expert) and (found.tokens < FEWEST_TOKENS or found.held_out_tokens < FEWEST_HELD_OUT):
                self.by_weights.add(one.name)

    def metrics(self, ffns: Iterable[AnyFFN], sums: Mapping[str, FisherSum]) -> dict[str, Tensor]:
        """The Fisher information to measure errors by, and notes of which experts it is not their own.

        Args:
            ffns: the FFNs.
            sums: of every dense FFN and every expert.

        Returns:
            The name of each -> tensor of shape (out_dim, out_dim). What an expert has from its layer has the size of
            its own: how much its errors matter in all, its few tokens tell.
        """
        found = {}
        for ffn in ffns:
            ones = networks_of(ffn)
            pooled = torch.stack([sums[one.name].product for one in ones]).sum(0)
            for one in ones:
                own = sums[one.name]
                if isinstance(ffn, Experts) and own.tokens < one.out_dim:
                    self.by_layer.add(one.name)
                    share = own.product.trace() / pooled.trace().clamp(min=1e-30)
                    found[one.name] = pooled * share.clamp(min=1e-12)
                else:
                    found[one.name] = own.product
        return found

    def in_words(self, plan: Iterable[AnyPlanned]) -> str:
        """What is recorded of it; "" if all of a plan's experts saw enough."""
        experts = sum(len(networks_of(p.ffn)) for p in plan if isinstance(p.ffn, Experts))
        by_layer = self.by_layer - self.by_weights
        kinds = (("were fused by their weights", self.by_weights), ("took the metric of their layer", by_layer))
        found = [f"{len(names)} {what} ({_listed(names)})" for what, names in kinds if names]
        return f"of {experts} experts, for want of tokens, {' and '.join(found)}" if found else ""


def _listed(names: Iterable[str]) -> str:
    """Experts by their layers: a.0 and a.2 as "a 0 2"."""
    layers: dict[str, list[int]] = {}
    for name in names:
        layer, _, index = name.rpartition(".")
        layers.setdefault(layer, []).append(int(index))
    return "; ".join(f"{layer} {' '.join(map(str, sorted(found)))}" for layer, found in sorted(layers.items()))
