"""What is known of every model type of transformers, in `known.json`: kept by `table.py`, held to by the test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

FILE = Path(__file__).with_name("known.json")


class Known(TypedDict):
    """What came of a model type.

    Args:
        outcome: one of `OUTCOMES`.
        layouts: the layouts of its FFNs.
        reason: why not more.
    """

    outcome: str
    layouts: list[str]
    reason: str


OUTCOMES = {
    "works": "fused, trained, saved, loaded bit-identically, merged, and the merged model loaded by transformers",
    "adapter": "fused, trained, saved and loaded bit-identically, and merged; but no checkpoint can state the widths",
    "refused": "refused by name before anything changes",
    "none": "no FFN",
    "untried": "no tiny model of it was built or run",
}


def read() -> dict[str, Known]:
    """A model type -> what is known of it."""
    known: dict[str, Known] = json.loads(FILE.read_text())
    return known
