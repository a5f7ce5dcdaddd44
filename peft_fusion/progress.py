"""A progress bar that follows transformers' setting and stays silent outside a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm
from transformers.utils import logging

Item = TypeVar("Item")


def progress(items: Iterable[Item], description: str) -> Iterable[Item]:
    """Iterates with a bar and the time left.

    Args:
        items: what to iterate over.
        description: what is being done to them.
    """
    return tqdm(items, desc=description, disable=None if logging.is_progress_bar_enabled() else True)
