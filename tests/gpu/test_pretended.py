"""Runs pretended_cases.py in a process of its own: a device that is registered stays, and others would look for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_nothing_is_on_the_wrong_device_and_no_loop_waits():
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), *(p for p in sys.path if p)]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-m",
        "",
        "-p",
        "no:cacheprovider",
        str(here / "pretended_cases.py"),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout[-6000:]
