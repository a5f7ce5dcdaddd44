"""The scripts and configurations of examples/distributed, by two processes: prepared, trained, stopped and resumed."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from architectures import BY_NAME
from launched import SCRIPTS
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from two import free_port

pytestmark = pytest.mark.slow

LLAMA = BY_NAME["llama"]
STEPS = 20
NO_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
IN_PARTS = ["fsdp2", pytest.param("zero3", marks=NO_DEEPSPEED)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose predictions depend on its FFNs, its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("model")
    llama = LLAMA.make()
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            parameter.mul_(4 if "mlp" in name else 8 if "lm_head" in name else 1)
    llama.save_pretrained(folder)
    words = {"<unk>": 0, **{f"w{index}": index for index in range(1, 99)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    draws = random.Random(0)
    (folder / "text.txt").write_text(" ".join(f"w{draws.randrange(1, 99)}" for _ in range(64 * 16)))
    return folder


@pytest.fixture(scope="module")
def launched(model: Path, tmp_path_factory: pytest.TempPathFactory):
    """Runs, once for each configuration: trains the adapter that DDP prepares, and again from a checkpoint on."""
    done: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in done:
            prepared = tmp_path_factory.mktemp(kind) / "prepared" if kind == "ddp" else run("ddp") / "prepared"
            folder = done[kind] = prepared.parent if kind == "ddp" else tmp_path_factory.mktemp(kind)
            given = f"--model {model} --data {model}/text.txt --block 16 --sequences 64 --adapter {prepared}"
            train = f"train.py {given} --steps 4 --save-steps 2 --learning-rate 1e-3 --output {folder}"
            commands = [f"{train}/whole", f"{train}/resumed --resume {folder}/whole/checkpoint-2"]
            if kind == "ddp":
                commands.insert(0, f"prepare.py {given} --ratio 0.5 --steps {STEPS}")
            launch(kind, *commands)
        return done[kind]

    return run


def launch(kind: str, *commands: str) -> None:
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(SCRIPTS / f"{kind}.yaml")]
    start += ["--mixed_precision", "no", "--main_process_port", str(free_port())]
    start += [str(Path(__file__).parent / "launched.py"), *commands]
    own = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    own |= {"DS_ACCELERATOR": "cpu"} if kind == "zero3" else {"ACCELERATE_USE_CPU": "true"}
    ended = subprocess.run(start, env=os.environ | own, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name} {text}"
        )


def test_two_processes_prepare_the_adapter_of_one(launched, model: Path, tmp_path: Path):
    """By the defaults, with all their draws: calibrated, distilled for 20 steps, saved."""
    command = [sys.executable, str(SCRIPTS / "prepare.py"), "--model", str(model), "--data", str(model / "text.txt")]
    command += [
        "--block",
        "16",
        "--sequences",
        "64",
        "--ratio",
        "0.5",
        "--steps",
        str(STEPS),
        "--adapter",
        str(tmp_path),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr[-4000:]
    before, after = map(float, re.findall(r"([0-9.]+) (?:before|after)", ended.stdout))
    assert after < before
    assert_equal(adapter(launched("ddp") / "prepared"), adapter(tmp_path))


@pytest.mark.parametrize("kind", ["ddp", *IN_PARTS])
def test_what_several_train_and_resume_loads_on_one_machine(kind: str, launched, model: Path):
    folder = launched(kind)
    trained, resumed = adapter(folder / "whole" / "adapter"), adapter(folder / "resumed" / "adapter")
    assert_equal(resumed, trained)
    prepared = adapter(launched("ddp") / "prepared")
    assert all(torch.equal(prepared[name], tensor) == name.endswith("scale") for name, tensor in trained.items())
    loaded = PeftModel.from_pretrained(LLAMA.make(), folder / "whole" / "adapter")
    held = {name.replace(".default.", "."): tensor for name, tensor in loaded.state_dict().items()}
    assert all(torch.equal(held[name], tensor) for name, tensor in trained.items())


@pytest.mark.parametrize("kind", IN_PARTS)
def test_parts_train_as_the_whole_does(kind: str, launched):
    assert_equal(adapter(launched(kind) / "whole" / "adapter"), adapter(launched("ddp") / "whole" / "adapter"))
