"""The card of an exported model: what it was made of and how, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..tuner.card import PAPER, TAG, how_made, widths_table
from ..tuner.config import FusionConfig

CARD = """---
{metadata}
---

# {title}

{what} Its feed-forward networks (FFNs) were made narrower by MLP Fusion
([paper]({paper})), by the package peft-fusion; it needs neither that nor PEFT.

## Loading

```python
{loading}
```

{note}

## What was made narrower

{widths}

Parameters: {before:,} before, {now:,} now ({share:.1%}).

## How
{method}
{fidelity}"""

MIXED = """Its FFNs differ in width, which `config.json` states in `per_layer_config` and `modeling_narrow.py`, beside
this file, builds: read that file before you trust it. Without `trust_remote_code=True` loading fails."""

STOCK = "All FFNs under one setting have one width, so that this is a checkpoint as any other."


@dataclass(frozen=True)
class Made:
    """What there is to tell of an exported model.

    Args:
        base: the model that it was made of: its Hub id, or the name of a local folder; "" if unknown.
        on_hub: whether that is a Hub id, which the card's metadata may name.
        kind: the class that loads it, of transformers.
        mixed: whether it comes with a modelling file.
        widths: FFN name -> neurons before and now, where these are known to differ.
        parameters: before and now.
        configs: of the fusion adapters that were merged.
        others: the types of other adapters that were merged.
        tokenizer: whether a tokenizer was written beside it.
        fidelity: figures, as text; "" if none were given.
    """

    base: str
    on_hub: bool
    kind: str
    mixed: bool
    widths: Mapping[str, tuple[int, int]]
    parameters: tuple[int, int]
    configs: list[FusionConfig]
    others: list[str]
    tokenizer: bool
    fidelity: str = ""


def card(made: Made, title: str, place: str = ".") -> str:
    """The text of the card.

    Args:
        made: what there is to tell.
        title: the model's name.
        place: where it is loaded from: its Hub id, or the folder that the card is in.
    """
    metadata = ["library_name: transformers", "tags:", f"- {TAG}"]
    if made.on_hub:
        metadata += [f"base_model: {made.base}"]
    before, now = made.parameters
    return CARD.format(
        metadata="\n".join(metadata),
        title=title,
        paper=PAPER,
        what=f"A smaller `{made.base}`." if made.base else "A smaller model.",
        loading=_loading(made, place),
        note=MIXED if made.mixed else STOCK,
        widths=widths_table(made.widths) if made.widths else "Not recorded: the model was narrow already.",
        before=before,
        now=now,
        share=now / before,
        method=_method(made),
        fidelity=f"\n## Fidelity to the original\n\n```\n{made.fidelity}\n```\n" if made.fidelity else "",
    )


def _loading(made: Made, place: str) -> str:
    """The lines that load it."""
    trust = ", trust_remote_code=True" if made.mixed else ""
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{place if made.tokenizer else made.base}")'
    lines = [f"from transformers import {made.kind}", "", f'model = {made.kind}.from_pretrained("{place}"{trust})']
    if made.tokenizer or made.on_hub:
        lines[0] += ", AutoTokenizer"
        lines.append(tokenizer)
    return "\n".join(lines)


def _method(made: Made) -> str:
    """What is recorded of the adapters that were merged."""
    lines = [how_made(config.fused_by or {}) for config in made.configs]
    lines += [f"- merged as well: {kind}" for kind in made.others]
    return "\n".join(["", *lines, ""]) if lines else "\nNot recorded: the model had no fusion adapter any more.\n"
