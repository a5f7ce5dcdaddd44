"""Each narrow FFN on its own learns to put out what the original one does, on the original's inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor

from ..ffn import FFN, capture
from ..fusing.metric import metric_root
from ..observe import ranks
from ..observe.batches import Batch, Positions, check_batch, single_sequences, unlabelled
from ..observe.fisher import fisher_information
from ..observe.gradients import NoGradients
from ..observe.networks import Network
from ..observe.own_inputs import OWN_LENGTH, own_inputs
from ..progress import progress
from .student import Student, fit

Errors = dict[str, tuple[float, float]]
"""FFN name -> its error before and after."""

METRIC_SEQUENCES = 128  # twice as many as in calibration, in a small part of the time that learning takes


def tune_ffn_outputs(
    original: Network,
    fused: Network,
    dataloader: Iterable[Batch] | None,
    learning_rate: float,
    steps: int,
    tokens: int,
    seed: int,
    prefix: Sequence[int] | None,
) -> Errors:
    """Tunes every narrow FFN; see `tune_layers`, objective "ffn"."""
    pairs = list(zip(original.dense, fused.dense, strict=True))
    with original.running():
        if dataloader is None:
            made = math.ceil(tokens / OWN_LENGTH)
            dataloader = ranks.together(lambda: own_inputs(original.model, made, OWN_LENGTH, seed, prefix=prefix))
        inputs, sequences = _collect_inputs(original, dataloader, tokens)
        fisher = _fisher(original, sequences, seed)

        def learn(teacher: FFN, student: FFN) -> tuple[Student, float, float]:
            x = inputs.pop(teacher.name)
            root = metric_root(fisher[teacher.name].to(x.device)) if teacher.name in fisher else None
            pupil = Student(student, teacher, root)
            return pupil, *fit(pupil, x, learning_rate, steps, seed)

        learnt = ranks.together(lambda: [learn(*p) for p in progress(ranks.own(pairs), "Tuning FFNs")])
    return _install(pairs, learnt)


def _install(pairs: Sequence[tuple[FFN, FFN]], learnt: Iterable[tuple[Student, float, float]]) -> Errors:
    """Writes what every rank's students learnt into the model, once all of it is there."""
    own = iter(learnt)
    errors: Errors = {}
    writing: list[tuple[Tensor, Tensor]] = []
    for index, (teacher, ffn) in enumerate(pairs):
        owner = ranks.owner(index)
        student, *found = next(own) if owner == ranks.rank() else (Student(ffn, teacher, None), 0.0, 0.0)
        before, after = ranks.object_from_rank(owner, tuple(found))
        values = ranks.from_rank(owner, [weight.detach() for weight in student.weights])
        writing += zip(student.parameters, values, strict=True)
        errors[ffn.name] = (before, after)
    write_all(writing)
    return errors


@torch.no_grad()
def write_all(writing: list[tuple[Tensor, Tensor]]) -> None:
    """Copies values into parameters; if that is interrupted, all are as they were."""
    before = [(parameter, parameter.detach().clone()) for parameter, _ in writing]
    try:
        for parameter, value in writing:
            parameter.copy_(value)
    except BaseException:
        for parameter, value in before:
            parameter.copy_(value)
        raise


def _fisher(original: Network, sequences: list[Batch], seed: int) -> dict[str, Tensor]:
    """The metric's Fisher information; none where the model has no gradients, and all errors then count alike."""
    try:
        return fisher_information(original, sequences, seed)
    except NoGradients:
        return {}


def _collect_inputs(
    network: Network, dataloader: Iterable[Batch], tokens: int
) -> tuple[dict[str, Tensor], list[Batch]]:
    """The inputs of this rank's FFNs, of all ranks: (tokens, in_dim), without padding; and some of its sequences.

    Raises:
        ValueError: if the data loader gives no batch that the model takes.
    """
    kept: dict[str, list[Tensor]] = {ffn.name: [] for ffn in network.dense}
    sequences: list[Batch] = []
    positions: list[Positions] = []
    share = ranks.share_of(tokens)

    def keep(name: str, x: Tensor) -> None:
        valid, _ = positions[-1].of(name, x)
        numbers = valid.nonzero().squeeze(1).to(x.device, non_blocking=True)
        kept[name].append(x.reshape(-1, x.shape[-1]).index_select(0, numbers))

    def collect() -> None:
        for batch in dataloader:
            check_batch(batch)
            positions[:] = [Positions(batch, network.is_encoder_decoder)]
            network(unlabelled(batch, network.is_encoder_decoder), logits=False)
            sequences.extend(islice(single_sequences(batch), ranks.share_of(METRIC_SEQUENCES) - len(sequences)))
            if min(sum(map(len, found)) for found in kept.values()) >= share:
                break
        if not all(kept.values()):
            raise ValueError(
                "The dataloader yields no batch: give one that can be iterated anew, with at least one batch."
            )

    with torch.no_grad(), capture(network.dense, inputs=keep):
        ranks.together(collect)
    inputs = {}
    for index, ffn in enumerate(network.dense):
        joined = ranks.joined_over_ranks(torch.cat(kept.pop(ffn.name))[:share])
        if ranks.owner(index) == ranks.rank():
            inputs[ffn.name] = joined
    return inputs, sequences
