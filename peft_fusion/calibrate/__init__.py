"""`calibrate`: one pass over a few batches, for a narrow FFN that does on real inputs what the original does.

Every FFN's second moments of hidden activations are accumulated (products only, four bytes times the square of its
width), and the inputs of a few held-out tokens are kept to choose by, and some with their gradients to scale by. They
stay on the model until `get_peft_model` uses them, and are freed then.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..ffn import features
from ..fusing.statistics import FFNStatistics
from ..observe.fisher import METRIC_SEQUENCES, fisher_information
from ..observe.networks import Network
from ..observe.own_inputs import OWN_LENGTH, own_inputs
from ..progress import progress
from ..tuner.calibration import keep_calibration
from ..tuner.config import FusionConfig
from ..tuner.plan import PlannedFFN, plan_ffns
from .recorder import Recorder, UnusableActivations
from .tangents import MOST_SEQUENCES, add_tangents, sequences_for

SEQUENCES, OWN_SEQUENCES = 128, 512  # the model's own are short

Batch = Mapping[str, Tensor]


def calibrate(
    model: nn.Module,
    config: FusionConfig,
    dataloader: Iterable[Batch] | None = None,
    *,
    sequences: int | None = None,
    length: int = OWN_LENGTH,
    ffns_per_pass: int | None = None,
) -> None:
    """Collects what data-aware fusion needs; call it before `get_peft_model` with the same configuration.

    The best inputs are those that the model will be fine-tuned on, then text that resembles them, then what a causal LM
    samples itself, then random tokens. 128 sequences suffice. Padding is left out where `attention_mask` says so.

    Then come a few backward passes, a sentence at a time: of the likelihood of the model's own predictions, which
    tells what errors they would show, and of a random projection of its output, for the scales of the narrow FFNs. No
    labels are needed. A model that has no gradients is fused without them.

    Memory beyond the model's: 4 * width ** 2 bytes an FFN, and 2048 inputs an FFN in the model's dtype. What is on
    a GPU is moved to CPU memory after each pass. For the scales, the activations that the backward pass of one
    sentence needs (of its first 64 tokens), and 1024 inputs and gradients an FFN in CPU memory; 88 sequences are kept
    for both.

    Args:
        model: the model to be fused, with or without fusion adapters.
        config: the configuration it will be fused with.
        dataloader: batches as `Trainer` gives them to the model: mappings of tensors. None: the model makes its own
            inputs, a causal LM by sampling text, another by random tokens.
        sequences: how many sequences to use at most; every fourth is held out to choose by. None: 128 of the data
            loader's, or 512 of the model's own.
        length: tokens in each of the model's own sequences.
        ffns_per_pass: how many FFNs to accumulate at once, for less memory on the model's device; the data loader
            is then iterated over several times. None: all of them.

    Raises:
        ValueError: if the configuration does not fit the model, there are too few batches, the model cannot take
            one, or activations are not finite. The model is as it was then.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    sequences = (OWN_SEQUENCES if dataloader is None else SEQUENCES) if sequences is None else sequences
    for name, value in (("sequences", sequences), ("length", length), ("ffns_per_pass", ffns_per_pass or 1)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, but got {value!r}.")
    planned = plan_ffns(model, config)
    statistics: dict[str, FFNStatistics] = {}
    side = Network(model, [p.ffn for p in planned], fused=False)
    with side.running():
        batches = own_inputs(model, sequences, length, config.seed) if dataloader is None else dataloader
        for start in range(0, len(planned), ffns_per_pass or len(planned)):
            group = planned[start : start + (ffns_per_pass or len(planned))]
            seen, sentences, held_out = _record(model, group, batches, sequences, statistics)
        for name, fisher in (fisher_information(side, sentences, config.seed + 2) or {}).items():
            statistics[name].fisher = fisher
        add_tangents(model, planned, held_out[: sequences_for(seen)], statistics, config.seed + 1)
    tokens = max(s.tokens + s.held_out_tokens for s in statistics.values())
    source = "the model's own inputs" if dataloader is None else "data"
    keep_calibration(model, planned, statistics, f"{seen} sequences, {tokens} tokens of {source}")


def _record(
    model: nn.Module,
    planned: Sequence[PlannedFFN],
    batches: Iterable[Batch],
    sequences: int,
    statistics: dict[str, FFNStatistics],
) -> tuple[int, list[Batch], list[Batch]]:
    """Runs batches through the model and adds the statistics of some of its FFNs.

    Returns:
        The number of sequences seen, some of them, and some held-out ones.
    """
    recorder = Recorder({p.ffn.name: _empty(p) for p in planned}, _decodes(model), METRIC_SEQUENCES, MOST_SEQUENCES)
    seen = 0
    with ExitStack() as hooks:
        for p in planned:
            first, *_, out = p.ffn.projections
            hooks.enter_context(_removed(first.register_forward_pre_hook(recorder.inputs_hook(p.ffn.name))))
            hooks.enter_context(_removed(out.register_forward_pre_hook(recorder.hidden_hook(p.ffn.name))))
        for batch in progress(batches, "Calibrating"):
            seen += recorder.start(batch, seen)
            _forward(model, batch)
            if seen >= sequences:
                break
    recorder.check(seen)
    statistics.update({name: statistic.cpu() for name, statistic in recorder.statistics.items()})
    return seen, recorder.sentences, recorder.held_out


def _decodes(model: nn.Module) -> bool:
    """Whether a model is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _empty(planned: PlannedFFN) -> FFNStatistics:
    first = planned.ffn.base_projections[0]
    return FFNStatistics(planned.ffn.width, features(first)[0], next(first.parameters()).device)


def _forward(model: nn.Module, batch: Batch) -> None:
    """One forward pass, without the loss and, where the model allows it, without the logits."""
    device = next(model.parameters()).device
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {name: value.to(device) for name, value in batch.items()}
    if "decoder_input_ids" in inputs or not _decodes(model):
        inputs.pop("labels", None)
    cheaper = {"use_cache": False, "logits_to_keep": 1}
    inputs |= {name: value for name, value in cheaper.items() if name in accepted and "labels" not in inputs}
    with torch.no_grad():
        try:
            model(**inputs)
        except (UnusableActivations, torch.OutOfMemoryError):
            raise
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"{type(model).__name__} cannot take a calibration batch with {sorted(batch)}: {error}. Give batches "
                "as `Trainer` would give them to it."
            ) from error


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    """Removes a hook at the end."""
    try:
        yield
    finally:
        handle.remove()
