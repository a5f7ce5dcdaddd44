"""The texts of quality.py that are not the test's: what the model samples, and text of another domain."""

from __future__ import annotations

from pathlib import Path

import torch
from common import wordnet
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_fusion.observe.own_inputs import OWN_LENGTH, own_inputs
from peft_fusion.observe.sampling import prefix_of


def own_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: int,
    results: Path | None,
    seed: int = 0,
    length: int = OWN_LENGTH,
) -> list[dict[str, torch.Tensor]]:
    """What the model samples itself; kept beside the finished rows, as it takes minutes."""
    kept = results.with_suffix(f".own{sequences}x{length}.{seed}.safetensors") if results else None
    return own_inputs(model, sequences, length, seed, kept, prefix_of(tokenizer))


def other_text() -> list[str]:
    """Text that is not from papers: WordNet's glosses, forty a document."""
    if wordnet.NOUNS.is_file():
        pairs = wordnet.glosses(wordnet.read_nouns())
        return ["\n".join(gloss for gloss, _ in pairs[start : start + 40]) for start in range(0, 16000, 40)]
    raise SystemExit("Calibration text of another domain: apt install wordnet-base, or use --text own.")
