"""What PEFT's model card leaves open in an adapter's folder, filled in from the adapter's configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftConfig

CARD = "README.md"
TAG = "peft-fusion"
PAPER = "https://arxiv.org/abs/2307.08941"
OPEN = "[More Information Needed]"
START, END = "<!-- peft-fusion: what was made narrower, and how -->", "<!-- peft-fusion: end -->"

LOADED_BY = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""PEFT's task type -> the class of transformers that loads the base."""

SUMMARY = "<!-- Provide a quick summary of what the model is/does. -->"
ARCHITECTURE = "### Model Architecture and Objective"
GET_STARTED = "Use the code below to get started with the model."


def fill_card(folder: Path, config: PeftConfig, widths: Mapping[str, Sequence[int]], recipe: Mapping[str, Any]) -> None:
    """Fills in the card that PEFT has put in a folder; what someone wrote there stays, and no card is made.

    Args:
        folder: the adapter's.
        config: its configuration.
        widths: FFN name -> neurons before and now.
        recipe: what is recorded of how they were made.
    """
    if not (folder / CARD).is_file():
        return
    card = ModelCard.load(folder / CARD)
    card.data["tags"] = sorted({*(card.data.get("tags") or []), TAG})
    text = card.text
    for opened, filled in _blanks(config).items():
        text = text.replace(opened, filled, 1)
    done = f"{START}\n\n{widths_table(widths)}\n\n{how_made(recipe)}\n\n{END}"
    if START in text and END in text:
        before, rest = text.split(START, 1)
        text = before + done + rest.split(END, 1)[1]
    else:
        text = text.replace(f"{ARCHITECTURE}\n\n{OPEN}", f"{ARCHITECTURE}\n\n{done}", 1)
    card.text = text
    card.save(folder / CARD)


def widths_table(widths: Mapping[str, Sequence[int]]) -> str:
    """FFNs and their neurons before and now, in Markdown."""
    rows = [f"| `{name}` | {wide} | {narrow} |" for name, (wide, narrow) in widths.items()]
    return "\n".join(["| FFN | neurons before | now |", "|---|--:|--:|", *rows])


def how_made(recipe: Mapping[str, Any]) -> str:
    """What is recorded of how an adapter was made, as a list in Markdown."""
    recorded = {name: value for name, value in recipe.items() if value}
    calibration = recorded.pop("calibration", "")
    lines = [f"- {name}: {value}" for name, value in recorded.items()]
    return "\n".join([*lines, f"- calibrated on: {calibration or 'nothing (made of the weights alone)'}"])


def _blanks(config: PeftConfig) -> dict[str, str]:
    """What PEFT's template leaves open -> the same, filled in."""
    base, kind = config.base_model_name_or_path or "", LOADED_BY.get(str(config.task_type), "AutoModel")
    if Path(base).exists():
        base = Path(base).name  # where it lies on this machine is of no use elsewhere
    summary = (
        f"An adapter{f' of `{base}`' if base else ''} that puts narrower feed-forward networks (FFNs) in the place of "
        f"the model's, made by [MLP Fusion]({PAPER}). PEFT loads it where the package peft-fusion is installed."
    )
    code = f"""```python
import peft_fusion  # makes the method known to PEFT
from peft import PeftModel
from transformers import {kind}

base = {kind}.from_pretrained("{base or "..."}")
model = PeftModel.from_pretrained(base, "...")  # this folder, or its id on the Hub
```"""
    filled = {
        f"{SUMMARY}\n\n\n": f"{SUMMARY}\n\n{summary}\n",
        f"- **Model type:** {OPEN}": "- **Model type:** adapter of the method MLP Fusion (`MLP_FUSION` in PEFT)",
        f"- **Paper [optional]:** {OPEN}": f"- **Paper [optional]:** {PAPER}",
        f"{GET_STARTED}\n\n{OPEN}": f"{GET_STARTED}\n\n{code}",
    }
    if base:
        finetuned = "- **Finetuned from model [optional]:**"
        filled[f"{finetuned} {OPEN}"] = f"{finetuned} {base}"
    return filled
