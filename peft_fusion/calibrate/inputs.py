"""What a model is calibrated on: batches of a data loader, or of its own making."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from ..observe import ranks
from ..observe.batches import Batch, batch_size, single_sequences, take
from ..observe.fisher import METRIC_SEQUENCES
from ..observe.networks import Network
from ..observe.own_inputs import own_inputs

SEQUENCES, OWN_SEQUENCES = 128, 512  # the model's own are short

HELD_OUT = 4
"""One sequence in so many is held out."""

MOST_SEQUENCES, FEWEST_SEQUENCES = 24, 6
"""Sequences that scales are fitted to: one of 20 that calibration sees, within these bounds."""

BUDGET_SEQUENCES = 64
"""Held-out sequences by which it is seen how much each FFN contributes."""


@dataclass(frozen=True)
class Inputs:
    """The batches of one rank, kept so that several passes see the same.

    Args:
        batches: mappings of tensors.
        source: where they come from, in words.
    """

    batches: list[Batch]
    source: str

    @classmethod
    def of(
        cls,
        network: Network,
        dataloader: Iterable[Batch] | None,
        sequences: int | None,
        length: int,
        seed: int,
        file: str | Path | None = None,
        prefix: Sequence[int] | None = None,
    ) -> Inputs:
        """Takes them from a data loader, or has the network make them.

        Raises:
            ValueError: if there are too few, or what is no batch.
        """
        if dataloader is None:
            sequences = sequences or OWN_SEQUENCES
            made = ranks.together(lambda: own_inputs(network.model, sequences, length, seed, file, prefix))
            inputs = cls(list(made), "the model's own inputs")
        else:
            share = ranks.share_of(sequences or SEQUENCES)
            inputs = cls(ranks.together(lambda: take(dataloader, share)), "data")
        ranks.together(inputs.check)
        return inputs

    def check(self) -> None:
        """Refuses too few sequences to hold any out.

        Raises:
            ValueError: naming how many there are.
        """
        if self.count < HELD_OUT:
            raise ValueError(
                f"Calibration needs at least {HELD_OUT} sequences, one of them to hold out, but got {self.count}. "
                f"{SEQUENCES} are a good number, or {OWN_SEQUENCES} of the model's own."
            )

    @cached_property
    def count(self) -> int:
        """This rank's sequences."""
        return sum(map(batch_size, self.batches))

    @property
    def for_the_metric(self) -> list[Batch]:
        """Sequences, one a batch, that the Fisher information is taken of."""
        sequences = (one for batch in self.batches for one in single_sequences(batch))
        return list(islice(sequences, ranks.share_of(METRIC_SEQUENCES)))

    @property
    def for_the_scales(self) -> list[Batch]:
        """Held-out sequences, one a batch, that scales are fitted to."""
        seen = int(ranks.sum_of(self.count))
        return self._held_out(min(MOST_SEQUENCES, max(FEWEST_SEQUENCES, seen // 20)))

    @property
    def for_the_budget(self) -> list[Batch]:
        """Held-out sequences, one a batch, by which it is seen how much each FFN contributes."""
        return self._held_out(BUDGET_SEQUENCES)

    def _held_out(self, sequences: int) -> list[Batch]:
        """The first of this rank's held-out sequences, one a batch; so many of all ranks together."""
        wanted = ranks.share_of(sequences)
        found: list[Batch] = []
        before = 0
        for batch in self.batches:
            held_out = single_sequences(batch, (HELD_OUT - 1 - before) % HELD_OUT, HELD_OUT)
            found += islice(held_out, wanted - len(found))
            before += batch_size(batch)
        return found
