"""Files inside pip packages."""

from __future__ import annotations

import pytest


def test_missing_package_says_how_to_install_it(example):
    with pytest.raises(ValueError, match=r"pip install --no-deps .*no-such-package==1\.0"):
        example("common.pip_files").package_folder("no_such_package", "no-such-package==1.0")
