"""Data sets of the `datasets` library, by Hub id or local path; splits and columns by type and usual name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import InputError

TEXT_COLUMNS = ("text", "sentence", "content", "review", "document", "question", "title")
PAIR_COLUMNS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
)
LABEL_COLUMNS = ("label", "labels", "category", "class", "target", "score")
TEST_SPLITS = ("test", "validation", "validation_matched", "dev")
READERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}


def load(name: str) -> Any:
    """A `DatasetDict` by Hub id ("owner/name" or "owner/name:config"), file, or folder."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"`{name}` needs the `datasets` library: pip install datasets") from error
    path = Path(name)
    try:
        if path.is_file() and path.suffix in READERS:
            options = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
            return datasets.load_dataset(READERS[path.suffix], data_files=str(path), **options)
        if (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(name)
        hub_id, _, config = name.partition(":")
        return datasets.load_dataset(hub_id, config or None)
    except Exception as error:  # the library raises many kinds; the user needs to know what was tried
        raise InputError(
            f"`{name}` is neither a data set of the examples nor a path or Hub id that `datasets` "
            f"can load: {type(error).__name__}: {error}"
        ) from error


def train_and_test(name: str, splits: Any) -> tuple[Any, Any]:
    """The training split and the labelled test or validation split; without one, a fifth of the former."""
    if "train" not in splits:
        raise InputError(f"`{name}` has no split `train`; it has {', '.join(splits)}")
    for split in TEST_SPLITS:
        if split in splits and not _is_unlabelled(splits[split]):
            return splits["train"], splits[split]
    parts = splits["train"].train_test_split(test_size=0.2, seed=0)
    return parts["train"], parts["test"]


def text_columns(name: str, features: Any) -> tuple[str, ...]:
    """The text column, or the two columns of a task on pairs of texts."""
    strings = [column for column in features if _dtype(features[column]).endswith("string")]
    candidates: list[tuple[str, ...]] = [pair for pair in PAIR_COLUMNS if set(pair) <= set(strings)]
    candidates += [(column,) for column in TEXT_COLUMNS if column in strings]
    others = [column for column in strings if column not in LABEL_COLUMNS]
    if not candidates and len(others) == 1:
        candidates = [(others[0],)]
    if not candidates:
        raise InputError(_which_column(name, "text", features, TEXT_COLUMNS))
    return candidates[0]


def label_column(name: str, features: Any, scores: bool = False) -> str:
    """The column of classes: the only one of type `ClassLabel`, else one with a usual name.

    Args:
        name: of the data set, for messages.
        features: of its training split.
        scores: whether numbers with a fraction may be labels as well.
    """
    classes = [column for column in features if hasattr(features[column], "names")]
    usual = [column for column in LABEL_COLUMNS if column in features]
    if not (classes or usual):
        raise InputError(_which_column(name, "label", features, LABEL_COLUMNS))
    column = classes[0] if len(classes) == 1 else (usual or classes)[0]
    known = _dtype(features[column]).endswith(("string", "bool")) or "int" in _dtype(features[column])
    if not known and not (scores and is_score(features[column])):
        raise InputError(f"`{name}`: column `{column}` is {features[column]}; one class per example is expected")
    return column


def is_score(feature: Any) -> bool:
    """Whether a column holds numbers with a fraction: something to regress on."""
    return "float" in _dtype(feature)


def _dtype(feature: Any) -> str:
    return str(getattr(feature, "dtype", ""))  # nested features have none


def _is_unlabelled(split: Any) -> bool:
    """Benchmarks such as GLUE publish test sets whose labels are all -1."""
    return any(all(value == -1 for value in split[column]) for column in LABEL_COLUMNS if column in split.features)


def _which_column(name: str, role: str, features: Any, expected: tuple[str, ...]) -> str:
    return f"`{name}`: no {role} column found in {dict(features)}; expected one of {', '.join(expected)}"
