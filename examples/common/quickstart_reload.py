"""Reloads what the quickstart saved and compares logits. quickstart.py calls it in fresh processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from .classifiers import logits
from .fine_tuning import be_quiet
from .load_models import classifier_path, load_classifier, load_tokenizer

TOLERANCE = 1e-4  # of the largest logit


def reload_adapter(folder: str, model: str | None) -> dict[str, Any]:
    """The saved adapter, on the model it was trained on."""
    from peft import PeftModel

    import peft_fusion  # noqa: F401  (tells PEFT of the method)

    be_quiet()
    reference = read_reference(folder)
    path = classifier_path(model)
    fused = PeftModel.from_pretrained(load_classifier(path, len(reference["logits"][0])), f"{folder}/saved")
    return compare("adapter reloaded in a fresh process", fused, path, reference)


def reload_merged(folder: str) -> dict[str, Any]:
    """The merged checkpoint, with nothing but transformers."""
    sys.modules["peft_fusion"] = None  # type: ignore[assignment]  # from here on, importing the plugin fails
    be_quiet()
    reference, path = read_reference(folder), f"{folder}/merged"
    plain = load_classifier(path, len(reference["logits"][0]))
    return compare("merged model reloaded by stock transformers, without the plugin", plain, path, reference)


def read_reference(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "reference.json").read_text(encoding="utf-8"))


def compare(title: str, model: torch.nn.Module, tokenizer: str, reference: dict[str, Any]) -> dict[str, Any]:
    """Exits with an error where the logits differ."""
    expected = torch.tensor(reference["logits"])
    found = logits(model, load_tokenizer(tokenizer), reference["inputs"])
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= TOLERANCE * scale:  # a NaN is no agreement either
        sys.exit(f"{title}: outputs DIFFER: max difference {difference:.1e}, logits up to {scale:.2f}")
    print(f"{title}: outputs agree: max difference {difference:.1e} (logits up to {scale:.2f})", flush=True)
    return {"check": title, "max_difference": difference, "max_logit": scale}
