"""`tune_layers`: brings a fused model closer to its original before it is fine-tuned, without labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from torch import nn

from ..observe.batches import Batch
from ..observe.own_inputs import check_unused
from ..observe.pair import pair
from ..observe.sampling import prefix_of
from .ffn_outputs import tune_ffn_outputs
from .hidden_states import tune_hidden_states

OBJECTIVES = ("ffn", "hidden_states")

__all__ = ["tune_layers"]


def tune_layers(
    model: nn.Module,
    dataloader: Iterable[Batch] | None = None,
    *,
    objective: str = "ffn",
    teacher: nn.Module | None = None,
    learning_rate: float | None = None,
    steps: int | None = None,
    tokens: int = 32768,
    accelerator: Accelerator | None = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Trains the fused weights, and nothing else, to do what the original's do on unlabelled inputs.

    "ffn": each narrow FFN on its own learns to put out what the original FFN does, on the original's inputs to it.
    The layers are independent, nothing is propagated through the model, and a narrow FFN is left as it is unless it
    gets better on held-out tokens. An error counts as far as the model's predictions depend on it: it is measured in
    the Fisher metric (`fusing/kernels.py`). Memory: `tokens` inputs an FFN, in the model's dtype.

    "hidden_states": the paper's layer-wise task-specific tuning: the whole fused model learns to reproduce the hidden
    states after every layer (mean squared error over tokens that are not padding).

    Args:
        model: a model with an active fusion adapter.
        dataloader: batches as the model takes them; labels are not used. None: "ffn" learns on what the model makes
            for itself, as `calibrate` does.
        objective: "ffn" or "hidden_states".
        teacher: the original model; None: the same model with its adapter disabled.
        learning_rate: of Adam. "ffn": relative to the root mean square of each weight tensor (default 0.03);
            "hidden_states": absolute, the one that fine-tuning will use (default 1e-4).
        steps: Adam's steps. "ffn": for each FFN (default 500); "hidden_states": batches (default: the data loader
            once).
        tokens: how many tokens "ffn" collects.
        accelerator: for "hidden_states": its mixed precision is used.
        tokenizer: as for `calibrate`, where there is no `dataloader`.
        seed: of the order of tokens.

    Returns:
        FFN name -> its relative squared output error, in that metric, on held-out tokens before and after; for
        "hidden_states" the mean squared error of the first and of the last tenth of the steps, under that name.

    Raises:
        ValueError: for an unknown objective, a number out of range, no fusion adapter, unusable batches,
            or no `dataloader` where the objective or the model needs one.
        RuntimeError: if the original weights were dropped and no teacher is given.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, but got {objective!r}.")
    for name, value in (("learning_rate", learning_rate), ("steps", steps), ("tokens", tokens)):
        if value is not None and not value > 0:
            raise ValueError(f"`{name}` must be above 0, but got {value!r}.")
    check_unused({"tokenizer": tokenizer}, dataloader, "dataloader")
    prefix = prefix_of(tokenizer)
    original, fused = pair(model, teacher)
    if objective == "ffn":
        if not fused.dense:
            raise ValueError(
                f"The fusion adapter of {type(fused.model).__name__} narrows routed experts alone, which cannot be "
                'tuned one by one. Use `objective="hidden_states"`, or `distill`.'
            )
        return tune_ffn_outputs(original, fused, dataloader, learning_rate or 0.03, steps or 500, tokens, seed, prefix)
    if dataloader is None:
        raise ValueError(f'`objective="{objective}"` needs a `dataloader`; only "ffn" does without.')
    return tune_hidden_states(original, fused, dataloader, learning_rate or 1e-4, steps, accelerator)
