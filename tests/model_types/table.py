"""The page of the documentation that says what comes of which model type: `python -m model_types.table` writes it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from .known import OUTCOMES, read
from .life import Life

PAGE = Path(__file__).parents[2] / "docs" / "model_types.md"
HEAD = """# Model types of transformers

One tiny model of every type was built, fused at full width (its outputs were reproduced to 1e-6) and, with every
neuron there twice, at half width (to 1e-5), trained a step, saved, loaded (bit-identically), merged, and loaded by
transformers without this package. `tests/test_model_types.py` does it again; what came of it is in
`tests/model_types/known.json`, from which `python -m model_types.table` (in `tests/`) writes this page.

| | types |
|---|--:|
"""


def table(known: Mapping[str, Life]) -> str:
    """The page, in Markdown."""
    by_outcome: dict[str, dict[str, Life]] = {outcome: {} for outcome in OUTCOMES}
    for name, life in known.items():
        by_outcome[life.outcome][name] = life
    counts = "".join(f"| {meaning} | {len(by_outcome[outcome])} |\n" for outcome, meaning in OUTCOMES.items())
    kept = {name: life for name, life in by_outcome["works"].items() if life.kept}
    return "\n".join(
        [
            HEAD + counts,
            _section("By layout", "layout", "types", _layouts(by_outcome["works"])),
            _section(
                "Merged and loaded by transformers with some FFNs left out",
                "type",
                "`exclude_modules`",
                {name: ", ".join(f"`{one}`" for one in _alike(life.kept)) for name, life in kept.items()},
            ),
            _section("No checkpoint states the widths", "type", "why", _reasons(by_outcome["adapter"])),
            _section("Refused", "type", "why", _reasons(by_outcome["refused"])),
            f"## No FFN is found\n\n{', '.join(by_outcome['none'])}\n",
            _section("Not tried", "type", "what a tiny model of it says", _reasons(by_outcome["untried"])),
        ]
    )


def _section(title: str, first: str, second: str, rows: Mapping[str, str]) -> str:
    lines = "".join(f"| {name} | {text} |\n" for name, text in rows.items())
    return f"## {title}\n\n| {first} | {second} |\n|---|---|\n{lines}"


def _layouts(lives: Mapping[str, Life]) -> dict[str, str]:
    found = defaultdict(list)
    for name, life in lives.items():
        for layout in life.layouts:
            found[f"`{layout}`"].append(name)
    return {layout: ", ".join(names) for layout, names in sorted(found.items(), key=lambda item: -len(item[1]))}


def _reasons(lives: Mapping[str, Life]) -> dict[str, str]:
    return {name: life.reason.replace("|", "/") for name, life in lives.items()}


def _alike(names: list[str]) -> list[str]:
    """Names with the numbers of layers left out, once each."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".N", name) for name in names))


if __name__ == "__main__":
    PAGE.write_text(table(read()))
