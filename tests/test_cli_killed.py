"""`peft-fusion fuse` and `export`, killed at random moments: the folder is the old one or the new one, whole."""

from __future__ import annotations

import sys

import pytest
from architectures import BY_NAME
from helpers import half
from killing import killed_again_and_again
from peft import get_peft_model

from peft_fusion.cli import main
from peft_fusion.export.folder import restore_replaced

pytestmark = pytest.mark.slow


def command(*arguments):
    def work():
        sys.argv = ["peft-fusion", *map(str, arguments)]
        main()

    return work


@pytest.mark.parametrize("verb", ["fuse", "export"])
def test_the_old_folder_or_the_new_one(verb, tmp_path):
    llama, base, small = BY_NAME["llama"], tmp_path / "base", tmp_path / "small"
    llama.make().save_pretrained(base)
    options = (small, "--overwrite", "--no-check")
    if verb == "fuse":
        works = [command("fuse", base, *options, "--width", width) for width in (16, 32)]
    else:
        for seed in (0, 1):
            model = get_peft_model(llama.make(), half(llama, seed=seed, init_weights=False))
            model.save_pretrained(tmp_path / f"adapter-{seed}")
        works = [command("export", tmp_path / f"adapter-{seed}", *options, "--base", base) for seed in (0, 1)]

    def look():
        restore_replaced(small)  # what the next call does first
        return {path.name: path.read_bytes() for path in small.iterdir()}

    killed_again_and_again(works, look)
