"""Text that a causal language model samples, behind what its tokenizer puts in front of a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..fusing.precision import fast_products

WORD = "a"


def prefix_of(tokenizer: Any) -> list[int] | None:
    """The tokens that texts begin with, whatever they say.

    A configuration names a start token also for models whose texts do not begin with it (SmolLM2's starts a turn of a
    chat), and a model that is used to one (Llama, Gemma) may say nothing sensible without it: only the tokenizer knows.

    Args:
        tokenizer: a tokenizer, or a processor that has one; None: not known.

    Returns:
        Token ids, none if texts begin with their own first token; None if there is no tokenizer.

    Raises:
        ValueError: if it is no tokenizer.
    """
    if tokenizer is None:
        return None
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise ValueError(
            f"`tokenizer` must be a tokenizer, a processor that has one, or None, but got {type(tokenizer).__name__}. "
            "Give `AutoTokenizer.from_pretrained(...)`."
        )
    plain = tokenizer.encode(WORD, add_special_tokens=False)
    ids = list(tokenizer.encode(WORD))
    return ids[: next((i for i in range(len(ids)) if ids[i : i + len(plain)] == plain), 0)]


def sample_text(
    model: Any, vocabulary: int, size: int, length: int, generator: torch.Generator, prefix: Sequence[int] | None
) -> Tensor:
    """Text sampled at temperature 1 behind a random token, which makes each about something else: (size, length).

    Whether text begins with a start token is up to the tokenizer, which `prefix` comes from. If that is not known, half
    of it does: what is first is what attention rests on when it has nothing to look at.
    """
    devices = (parameter.device for parameter in model.parameters())  # "meta" where a weight is on disk
    device = next((device for device in devices if device.type != "meta"), torch.device("cpu"))
    start = getattr(model.config, "bos_token_id", None)
    text = torch.randint(0, vocabulary, (size, 1), generator=generator).to(device)
    with torch.no_grad(), _plain_generation(model), fast_products(device):
        if prefix is not None:
            text = behind(prefix, text)
        elif start is not None and length > 1:
            half = size // 2
            text = torch.cat([behind([start], text[:half]), _continued(model, text[half:], 2, generator)])
        return _continued(model, text, length, generator)


def behind(prefix: Sequence[int], text: Tensor) -> Tensor:
    """Beginnings of text, shape (size, tokens), with the same tokens in front of all."""
    return torch.cat([text.new_tensor(prefix).expand(len(text), -1), text], dim=1)


def _continued(model: Any, text: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Beginnings of text, shape (size, tokens), sampled on until they have so many tokens."""
    missing = length - text.shape[1]
    if missing <= 0:
        return text[:, :length]
    continued: Tensor = model.generate(
        text,
        attention_mask=torch.ones_like(text),
        do_sample=False,
        logits_processor=LogitsProcessorList([_Draw(generator)]),
        min_new_tokens=missing,
        max_new_tokens=missing,
        pad_token_id=0,
    )
    return continued


class _Draw(LogitsProcessor):
    """Draws the next token, one random number a sequence, and leaves it as the only one that can be chosen.

    `generate` draws with a random number for every token of the vocabulary, which takes longer than the model.

    Args:
        generator: on the CPU, so that the numbers are the same on every device.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        below = scores.float().softmax(-1).cumsum_(-1)
        uniform = torch.rand(len(below), 1, generator=self.generator).to(below.device) * below[:, -1:]
        drawn = torch.searchsorted(below, uniform, right=True).clamp_(max=below.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Sets aside what the model's generation config asks for: penalties, beams, forced tokens, other return types."""
    before = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=before.eos_token_id, bos_token_id=before.bos_token_id)
    try:
        yield
    finally:
        model.generation_config = before
