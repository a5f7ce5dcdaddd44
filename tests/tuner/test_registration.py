"""Importing the package changes nothing for users of other methods."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import others
import pytest

import peft_fusion

TESTS, ROOT = Path(__file__).parents[1], Path(peft_fusion.__file__).parents[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    """What came of everything, without the package and with it."""
    results = []
    for package in ("", "peft_fusion"):
        folder = tmp_path_factory.mktemp("others")
        paths = os.pathsep.join([str(TESTS), *[str(ROOT)] * bool(package)])
        subprocess.run(
            [sys.executable, others.__file__, str(folder), package], check=True, env={**os.environ, "PYTHONPATH": paths}
        )
        results.append(json.loads((folder / "found.json").read_text()))
    return results


def test_all_was_tried(found):
    without, with_package = found
    assert without.keys() == with_package.keys() and len(without) > 25
    assert sum("Error" in outcome["said"] for outcome in without.values()) > 12


def test_other_methods_do_what_they_did(found):
    without, with_package = found
    for name, outcome in without.items():
        for kind, expected in outcome.items():
            said = with_package[name][kind]
            if name == "not for mixed":  # it lists what is
                said = said.replace(", <PeftType.MLP_FUSION: 'MLP_FUSION'>", "") if kind == "said" else said
            assert said == expected, (name, kind)
