"""`distill`: a narrow model learns back what its original predicts, and the original is the same model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from ..observe.batches import Batch
from ..observe.own_inputs import OWN_LENGTH
from ..observe.pair import pair
from ..observe.sampling import prefix_of
from ..observe.shared_layers import SharedLayers, shared_layers
from .checks import check, check_engine
from .predictions import Predictions, chosen_outputs, original_shown
from .sequences import Sequences, collate, given_sequences, own_sequences, split
from .setting import default_arguments, training
from .teacher import teacher
from .trainer import BestWeights, Distillation, random_states_kept

__all__ = ["Distilled", "distill", "teacher"]

OWN_TOKENS = 2**17


@dataclass(frozen=True)
class Distilled:
    """What came of a distillation.

    Args:
        before: the distance from the original on held-out sequences before it, or at the checkpoint it resumed from:
            KL(original || narrow) in nats a position, or the relative squared distance of hidden states.
        after: the same of the model as it is now.
        outputs: what was compared, "logits" or "hidden_states".
        sequences: how many it learnt from.
        held_out: how many it was judged by.
    """

    before: float
    after: float
    outputs: str
    sequences: int
    held_out: int


def distill(
    model: nn.Module,
    data: Iterable[Batch] | Dataset | None = None,
    *,
    tokens: int | None = None,
    teacher: nn.Module | None = None,
    train: str = "narrow",
    outputs: str = "auto",
    args: TrainingArguments | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    length: int | None = None,
    own_text: str | Path | None = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> Distilled:
    """Trains a fused model to predict what its original predicts: forward KL of the logits over all classes.

    The original needs no memory of its own: it is the same model with its original FFNs, and the layers below the
    first narrow one run once for both. No labels are needed, nor any data: a causal LM samples text that it then
    learns on. It is best done after `calibrate`, and before or instead of training on a task.

    The model keeps the best weights that it had at any look at the held-out sequences, also if it is interrupted;
    those are the ones it came with if nothing was better.

    Memory beyond that of plain training of the same weights: one batch of logits, and the trained weights in CPU
    memory.

    Args:
        model: a model with an active fusion adapter, or one that is narrow for good (then with a `teacher`).
        data: what to learn on, as the model takes it: batches, a data loader or a dataset, without labels (they are
            not used). One sequence in sixteen, at most 64, is held out. None: what the original samples itself.
        tokens: how many tokens to sample, or at most to take of `data`. None: 131072, or all.
        teacher: the model to learn from; None: the original that `model` holds.
        train: which parameters: "narrow" (those of the narrow FFNs), "adapters" (all that require gradients now: LoRA
            beside the narrow FFNs, or modules that are trained in full) or "all" (all that a `teacher` does not share).
        outputs: what is compared: "logits", "hidden_states" (those behind the last layer, by their relative squared
            distance) or "auto": logits, unless of a head that is not trained yet (all of its biases are zero).
        args: `Trainer`'s arguments; all of them apply. None: one epoch of AdamW in one cosine from 2e-4, 16 sequences
            a step, in bfloat16 where that is fast.
        callbacks: for `Trainer`.
        length: tokens in each of the sampled sequences. None: 64.
        own_text: a `.safetensors` file that the sampled text is written to, or read from if it exists.
        tokenizer: the model's; sampled text then begins as its texts do. None: half of it with the start token that the
            model's config names, half without.
        seed: of the sampled text and, without `args`, of the order.

    Returns:
        The distances before and after.

    Raises:
        ValueError: if there is no original to learn from, a setting is unknown or not of what is given, each process
            holds a part of the weights (or DeepSpeed ZeRO-3 would have it so), or the data holds no sequences that the
            model takes.
        RuntimeError: if the original weights were dropped and no teacher is given.
    """
    sampled = {"own_text": own_text, "length": length, "tokenizer": tokenizer}
    check(data, train, outputs, teacher, sampled, tokens=tokens, length=length)
    prefix = prefix_of(tokenizer)
    check_engine(args)
    original, fused = pair(model, teacher, each_ffn=False)
    host = fused.model
    with original.running():
        examples = (
            own_sequences(original, tokens or OWN_TOKENS, length or OWN_LENGTH, seed, own_text, prefix)
            if data is None
            else given_sequences(original, data, tokens)
        )
        learnt, held_out = split(examples)
        compared = outputs if outputs != "auto" else chosen_outputs(original, collate(held_out[:1]))
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    with ExitStack() as stack:
        if teacher is not None:
            stack.enter_context(original.running())
        arguments = copy.copy(args) if args else stack.enter_context(default_arguments(host, len(learnt), seed))
        # by itself, before it trains, it would prepare the model for evaluation, and not anew for training by several
        arguments.eval_on_start = True
        names = stack.enter_context(training(bare, host, train, original.model if teacher else None))
        stack.enter_context(random_states_kept())
        best, predictions = BestWeights(host, names), Predictions(compared, fused.is_encoder_decoder)
        with fused.running():
            shared = _layers_to_share(host, names, predictions, collate(held_out[:1])) if teacher is None else None
        trainer = Distillation(
            predictions=predictions,
            teacher=None if teacher is None else original.model,
            shared=shared,
            model=bare,
            args=arguments,
            train_dataset=Sequences(learnt),
            eval_dataset=Sequences(held_out),
            data_collator=collate,
            callbacks=[*callbacks, best],
        )
        if args is None:
            trainer.remove_callback(PrinterCallback)
        before, after = _run(trainer, best)
    return Distilled(before, after, compared, len(learnt), len(held_out))


def _layers_to_share(
    host: nn.Module, names: Sequence[str], predictions: Predictions, batch: Batch
) -> SharedLayers | None:
    """The layers that a model and its original run once for both, if that is seen to make no difference."""
    shared = shared_layers(host, names)
    if not shared.layers:
        return None
    with torch.no_grad():
        with shared.noting(), original_shown(host):
            predictions.of(host, batch)
        with shared.skipped():
            found = predictions.of(host, batch)
        expected = predictions.of(host, batch)
    return shared if torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())) else None


def _run(trainer: Distillation, best: BestWeights) -> tuple[float, float]:
    """Trains; whatever ends it, the model has its best weights then."""
    try:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        trainer.evaluate()
    finally:
        best.put_back()
    return best.first, best.best
