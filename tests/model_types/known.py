"""What is known of every model type of transformers: kept in `known.json`, which `python -m model_types.known` renews.

In `tests/`, with transformers' newest supported version; types that are named are tried again, else all are.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils import logging

from .build import classes
from .life import Life, Untried, live

FILE = Path(__file__).with_name("known.json")

OUTCOMES = {
    "works": "fused, trained a step, saved, loaded bit-identically, merged, and loaded by transformers alone",
    "adapter": "the same but for the last: no checkpoint can state the widths, which a warning says before the work",
    "refused": "refused by name before anything changes",
    "none": "without an FFN that is found",
    "untried": "no tiny model of it was built or run",
}


def read() -> dict[str, Life]:
    """A model type -> what is known of it."""
    return {model_type: Life(**life) for model_type, life in json.loads(FILE.read_text()).items()}


def tried(model_type: str) -> Life:
    """What comes of a type now."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return live(model_type, Path(folder))
        except Untried as error:
            return Life("untried", [], [], str(error))


def main() -> None:
    """Tries types, and writes the file."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    for model_type in sys.argv[1:] or classes():
        start = time.process_time()
        try:
            life = tried(model_type)
        except Exception as error:
            print(f"{model_type}: FAILED: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        seconds = time.process_time() - start
        print(f"{model_type}: {life.outcome} in {seconds:.1f} s {life.reason[:200]}", flush=True)
        known = {**(read() if FILE.exists() else {}), model_type: life}
        listed = [(name, known[name]) for name in sorted(known) if name in classes()]
        rows = (f"{json.dumps(name)}: {json.dumps(asdict(one))}" for name, one in listed)
        FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    print(dict(Counter(life.outcome for life in read().values())))


if __name__ == "__main__":
    main()
