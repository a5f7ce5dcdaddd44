"""An adapter saved over another, killed at random moments: one of the two is there, whole."""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest
from architectures import BY_NAME
from helpers import half, logits
from killing import forked, killed_again_and_again
from peft import PeftModel, get_peft_model

from peft_fusion import FusionConfig

pytestmark = pytest.mark.slow

LLAMA = BY_NAME["llama"]


def test_the_old_adapter_or_the_new_one(tmp_path):
    models = [get_peft_model(LLAMA.make(), half(LLAMA, seed=seed, init_weights=False)) for seed in (0, 1)]
    works = [lambda model=model: model.save_pretrained(tmp_path / "adapter") for model in models]
    base = LLAMA.make()

    def look():
        model = PeftModel.from_pretrained(base, tmp_path / "adapter")
        found = logits(model, LLAMA)
        model.unload()
        return found.tolist()

    killed_again_and_again(works, look)


@pytest.mark.parametrize("moment", ["written", "replaced"])
def test_a_configuration_is_the_old_one_or_the_new_one(moment, tmp_path, monkeypatch):
    half(LLAMA, seed=0).save_pretrained(str(tmp_path))
    replace = os.replace

    def killed(*paths):
        if moment == "replaced":
            replace(*paths)
        os.kill(os.getpid(), signal.SIGKILL)

    def work():
        monkeypatch.setattr(sys.modules["peft_fusion.tuner.config"].os, "replace", killed)
        half(LLAMA, seed=1).save_pretrained(str(tmp_path))

    os.waitpid(forked(work), 0)
    assert FusionConfig.from_pretrained(str(tmp_path)).seed == (moment == "replaced")
    half(LLAMA, seed=2).save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["seed"] == 2
