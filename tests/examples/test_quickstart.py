"""The quickstart: what it holds beside the rows that it measures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_heavy_libraries_stay_out_of_the_parent():
    """Listing the methods must not cost seconds, nor the parent gigabytes beside the rows that it measures."""
    code = "import sys, quickstart; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    start = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); {code}"
    assert subprocess.check_output([sys.executable, "-c", start], text=True).strip() == "[]"
