"""Tables, sizes, peak memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"


def test_text_table(example):
    table = example("common.reporting").text_table(["name", "x"], [["a", "1.25"], ["longer", "2"]])
    assert table.splitlines() == ["name       x", "------  ----", "a       1.25", "longer     2"]


def test_folder_size(example, tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_bytes(b"x" * 5000)
    assert example("common.reporting").folder_size(tmp_path) == pytest.approx(0.005)


def test_peak_memory_is_the_processs_own():
    """A small process started by a big one: what the parent held does not count."""
    report = "import sys; sys.path.insert(0, sys.argv[1]); from common import reporting; print(reporting.peak_memory())"
    hold = "held = b'x' * 300_000_000; "
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {report!r}, sys.argv[1]])"

    def peak(code: str) -> float:
        return float(subprocess.check_output([sys.executable, "-c", code, str(EXAMPLES)]))

    alone = peak(report)
    assert peak(hold + start) < alone + 100
    assert peak(hold + report) > alone + 290
