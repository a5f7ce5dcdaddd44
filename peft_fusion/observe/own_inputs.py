"""Calibration inputs that a model makes for itself, for when no data may or can be used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..progress import progress
from . import ranks
from .kept_text import check_file, read_text, write_text
from .sampling import behind, sample_text

OWN_LENGTH = 64
"""Tokens of a sequence: many short texts are about more than a few long ones.

SmolLM2 calibrated on 512 sequences of 64 tokens of its own has a perplexity 3 % lower than on 128 of 256.
"""

BATCH_SIZE = 256  # decoding is bound by reading the weights: more at once is faster
CACHE_SHARE = 0.5  # keys and values of a batch take at most so much of what the model's weights take
RUN_SIZE = 64  # sequences of a batch that is given out


def check_unused(given: Mapping[str, Any], data: object, name: str) -> None:
    """Refuses settings of a model's own inputs beside data.

    Args:
        given: the settings, None where nothing was asked for.
        data: None if the model makes its inputs.
        name: of the argument that the data came in.

    Raises:
        ValueError: naming the setting.
    """
    for setting, value in given.items():
        if data is not None and value is not None:
            raise ValueError(f"`{setting}` is of what the model samples where there is no `{name}`; give one of them.")


def own_inputs(
    model: nn.Module,
    sequences: int,
    length: int,
    seed: int,
    file: str | Path | None = None,
    prefix: Sequence[int] | None = None,
) -> list[dict[str, Tensor]]:
    """Batches of inputs without any data: a causal LM's own text, random tokens for any other text model.

    Sampled text is close to what the model was trained on and calibrates better than a narrow text of another domain;
    random tokens do worse, but far better than nothing. Of several ranks each makes some of the batches.

    Args:
        model: a transformers model that takes `input_ids`.
        sequences: how many sequences to make, on all ranks together.
        length: tokens in each.
        seed: makes them repeatable; torch's global random state is left as it was.
        file: read in place of making them, if it exists, else written; see `kept_text`.
        prefix: token ids that all begin with. None: of a causal LM half, with the start token of its config.

    Returns:
        `input_ids` (and for an encoder-decoder `decoder_input_ids`) of shape (batch, length).

    Raises:
        ValueError: if the model takes no token ids, has no vocabulary to draw from, or does not know the prefix.
    """
    vocabulary = _vocabulary(model)
    if prefix and max(prefix) >= vocabulary:
        raise ValueError(
            f"`tokenizer` begins texts with {prefix}, but the model knows {vocabulary} tokens. Give its own."
        )
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None) or length + 2
    length = min(length, positions - 2)  # RoBERTa's positions start at 2
    if file is not None:
        check_file(file)
        if Path(file).exists():
            return list(_parts(read_text(file, sequences, length, vocabulary, prefix)))[ranks.rank() :: ranks.world()]
    size = min(_at_once(model, length), -(-sequences // ranks.world()))
    starts = range(0, sequences, size)[ranks.rank() :: ranks.world()]
    batches: list[dict[str, Tensor]] = []
    for start in progress(starts, "Making inputs"):
        count = min(size, sequences - start)
        generator = torch.Generator().manual_seed(seed + start)
        if _is_causal_lm(model):
            made = {"input_ids": sample_text(model, vocabulary, count, length, generator, prefix)}
        else:
            ids = torch.randint(0, vocabulary, (2, count, length), generator=generator)
            made = {"input_ids": behind(prefix or (), ids[0])[:, :length]}
            made |= {"decoder_input_ids": ids[1]} if config.is_encoder_decoder else {}
        batches += _parts(made)
    if file is not None:
        write_text(file, batches, prefix)
    return batches


def _at_once(model: nn.Module, length: int) -> int:
    """How many sequences to make at once: as many as there is memory for keys and values."""
    config: Any = model.config
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    layers, dim = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not _is_causal_lm(model) or not layers or not dim:
        return BATCH_SIZE
    weights = sum(parameter.nbytes for parameter in model.parameters())
    fits = int(CACHE_SHARE * weights / (2 * layers * dim * length * 2))  # of every head its own, in two bytes
    return max(RUN_SIZE, min(BATCH_SIZE, fits // RUN_SIZE * RUN_SIZE))


def _parts(made: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Batches of a size to be run in one piece, without a cache."""
    pieces = {name: value.split(RUN_SIZE) for name, value in made.items()}
    for i in range(len(pieces["input_ids"])):
        yield {name: value[i].clone() for name, value in pieces.items()}


def _vocabulary(model: Any) -> int:
    """How many token ids a text model knows: its embedding may hold fewer than its configuration says.

    Raises:
        ValueError: if it takes no token ids.
    """
    takes = getattr(model, "main_input_name", "input_ids")
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if takes != "input_ids" or not isinstance(vocabulary, int):
        lack = "has no `config.vocab_size`" if takes == "input_ids" else f"takes `{takes}` and not `input_ids`"
        raise ValueError(f"{type(model).__name__} {lack}, so it cannot make inputs of its own. Pass a `dataloader`.")
    with suppress(AttributeError, NotImplementedError):  # no embedding, or none that transformers finds
        return min(vocabulary, model.get_input_embeddings().num_embeddings)
    return vocabulary


def _is_causal_lm(model: nn.Module) -> bool:
    """Whether a model generates text by itself, from a start token alone."""
    can_generate = getattr(model, "can_generate", lambda: False)
    return bool(can_generate()) and not getattr(model.config, "is_encoder_decoder", False)
