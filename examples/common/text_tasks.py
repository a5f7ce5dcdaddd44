"""Labelled text tasks, from pip packages, files or the Hub.

By name (`load_text_classification`):
    papers    sentence of a scientific paper -> challenge, approach, outcome or none (default; from pip)
    wordnet   gloss of a noun -> its lexicographer class, 26 classes (from Debian, or a `data.noun`)
    any Hub id ("owner/name" or "owner/name:config") or local path of the `datasets` library
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from . import hub_datasets as hub
from . import scientific_papers as papers
from . import wordnet

# A text, and None or the second text of a pair; the index of its label (in a regression, the score)
Example = tuple[str, "str | None", "int | float"]


@dataclass(frozen=True)
class TextClassification:
    """A labelled text task with a fixed split into training and test examples."""

    name: str
    labels: list[str]
    train: list[Example]
    test: list[Example]

    def sample(self, train: int | None, test: int | None, seed: int = 0) -> TextClassification:
        """The same task with at most that many examples, drawn at random; None keeps all."""
        return replace(self, train=draw(self.train, train, seed), test=draw(self.test, test, seed))

    def validation(self, share: float = 0.1, seed: int = 0) -> TextClassification:
        """The task to choose settings by: some training examples are tested on instead, and not trained on."""
        mixed = draw(self.train, None, seed)
        cut = max(1, int(len(mixed) * share))
        return replace(self, train=mixed[cut:], test=mixed[:cut])

    def majority(self) -> float:
        """Test accuracy of always answering the most frequent training label."""
        most_common = Counter(label for *_, label in self.train).most_common(1)[0][0]
        return sum(label == most_common for *_, label in self.test) / len(self.test)


def load_text_classification(name: str = "papers") -> TextClassification:
    """A labelled text task by name.

    Args:
        name: "papers", "wordnet", the path of a `data.noun`, or a Hub id or local path for `datasets`.

    Raises:
        InputError: no such data set, its files are missing, or its text or label column cannot be told.
    """
    if name == "papers":
        return from_pairs(name, papers.role_task("train"), papers.role_task("test"))
    if wordnet.is_wordnet(name):
        pairs = draw(wordnet.glosses(wordnet.read_nouns(name)), None)
        cut = len(pairs) // 10
        return from_pairs("wordnet", pairs[cut:], pairs[:cut])
    return from_columns(name, hub.load(name))


def from_pairs(name: str, train: list[tuple[str, str]], test: list[tuple[str, str]]) -> TextClassification:
    """A task from (text, label name) pairs; labels are those of `train`, sorted."""
    labels = sorted({label for _, label in train})
    index = {label: i for i, label in enumerate(labels)}

    def examples(pairs: list[tuple[str, str]]) -> list[Example]:
        return [(text, None, index[label]) for text, label in pairs if label in index]

    return TextClassification(name, labels, examples(train), examples(test))


def from_columns(name: str, splits: Any) -> TextClassification:
    """A task from a `DatasetDict`: columns by type and usual name, the test set by usual split name."""
    train, test = hub.train_and_test(name, splits)
    labels, read = column_reader(name, train)
    return TextClassification(name, labels, read(train), read(test))


def column_reader(name: str, train: Any, regression: bool = False) -> tuple[list[str], Callable[[Any], list[Example]]]:
    """The labels of a training split (none in a regression), and a function that reads any split's examples.

    Examples that have no label, or one that `train` lacks, are left out.
    """
    texts, column = hub.text_columns(name, train.features), hub.label_column(name, train.features, regression)
    names = getattr(train.features[column], "names", None)  # a ClassLabel column holds indices into its names
    values = [] if regression else range(len(names)) if names else sorted(set(train[column]), key=str)
    index = {value: i for i, value in enumerate(values)}

    def label(value: Any) -> int | float | None:
        return index.get(value) if not regression or value is None else float(value)

    def read(split: Any) -> list[Example]:
        seconds = split[texts[1]] if len(texts) == 2 else [None] * len(split)
        rows = zip(split[texts[0]], seconds, map(label, split[column]), strict=True)
        return [(text, pair, found) for text, pair, found in rows if found is not None]

    return [str(value) for value in (names if names and not regression else values)], read


def draw(items: list, count: int | None, seed: int = 0) -> list:
    """At most `count` items in random order, the same for a seed; None: all of them."""
    return random.Random(seed).sample(items, len(items) if count is None else min(count, len(items)))
