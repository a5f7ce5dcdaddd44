"""WordNet's nouns, from Debian's `wordnet-base` or a `data.noun` by path."""

from __future__ import annotations

from pathlib import Path

from .errors import InputError

NOUNS = Path("/usr/share/wordnet/data.noun")


def is_wordnet(name: str) -> bool:
    """Whether a data set's name stands for WordNet: "wordnet", or the path of a `data.noun`."""
    return name == "wordnet" or Path(name).name == "data.noun"


def read_nouns(name: str = "wordnet") -> list[str]:
    """The entries of a `data.noun`, one a line, without the licence on top.

    Args:
        name: as `is_wordnet` takes it.

    Raises:
        InputError: there is no such file.
    """
    path = NOUNS if name == "wordnet" else Path(name)
    if not path.is_file():
        raise InputError(
            f"{path} does not exist: install WordNet (Debian, Ubuntu: apt install wordnet-base), or give the path of "
            "its `data.noun`, or other data, as --dataset (see --help)"
        )
    return entries(path.read_text(encoding="utf-8"))


def entries(text: str) -> list[str]:
    """The lines of a `data.noun` but those of the licence, which are indented."""
    return [line for line in text.splitlines() if not line.startswith("  ")]


def split_entry(line: str) -> tuple[list[str], str]:
    """The fields of an entry, and its definition without the quoted examples."""
    fields, gloss = line.split(" | ", 1)
    return fields.split(), gloss.split('; "')[0].strip()


def glosses(lines: list[str]) -> list[tuple[str, str]]:
    """(definition, class) of each entry; the class is the number of its lexicographer file."""
    return [(gloss, fields[1]) for fields, gloss in map(split_entry, lines)]
