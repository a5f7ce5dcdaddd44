"""Data sets of the `datasets` library."""

from __future__ import annotations

import pytest


def test_no_training_split(example):
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})})
    with pytest.raises(ValueError, match="no split `train`; it has test"):
        example("common.hub_datasets").train_and_test("t", splits)
