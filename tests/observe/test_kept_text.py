"""Own text in a file: written once, read again, and refused where it is not what is needed."""

from __future__ import annotations

import pytest
import torch
from architectures import BY_NAME
from safetensors.torch import load_file, save_file

from peft_fusion import FusionConfig, calibrate
from peft_fusion.observe.own_inputs import own_inputs
from peft_fusion.tuner.handover import handed_over


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_written_once_and_read_again(name, tmp_path, monkeypatch):
    model, file = BY_NAME[name].make(), tmp_path / "own.safetensors"
    made = own_inputs(model, 70, 8, seed=0, file=file)
    again = own_inputs(model, 70, 8, seed=5, file=file)  # read, so that the seed has no say
    assert all(torch.equal(a[key], b[key]) for a, b in zip(made, again, strict=True) for key in a)
    fewer = own_inputs(model, 10, 8, seed=0, file=file)
    assert torch.equal(fewer[0]["input_ids"], made[0]["input_ids"][:10])
    assert [path.name for path in tmp_path.iterdir()] == ["own.safetensors"]


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"input_ids": torch.ones(3, 8, dtype=torch.int64)}, "holds 3 sequences of 8 tokens.*4 of 8 tokens below 99"),
        ({"input_ids": torch.ones(4, 9, dtype=torch.int64)}, "holds 4 sequences of 9 tokens"),
        ({"input_ids": torch.full((4, 8), 99)}, "the largest 99"),
        ({"weight": torch.ones(4, 8)}, r"is no file of own text: it holds \['weight'\]"),
        ({"input_ids": torch.ones(4, 8)}, "is no file of own text"),
    ],
)
def test_what_is_not_needed_is_refused(held, message, tmp_path):
    file = tmp_path / "own.safetensors"
    save_file(held, file)
    with pytest.raises(ValueError, match=message):
        own_inputs(BY_NAME["llama"].make(), 4, 8, seed=0, file=file)
    assert load_file(file).keys() == held.keys()


@pytest.mark.parametrize("file", ["own.pt", "missing/own.safetensors"])
def test_a_file_that_cannot_be_is_refused_before_any_work(file, tmp_path, monkeypatch):
    model = BY_NAME["llama"].make()
    monkeypatch.setattr(model, "generate", None)
    with pytest.raises(ValueError, match="`.safetensors` file of a folder that exists"):
        own_inputs(model, 4, 8, seed=0, file=tmp_path / file)


def test_calibrate_keeps_it(tmp_path):
    llama, file, config = BY_NAME["llama"], tmp_path / "own.safetensors", FusionConfig(ratio=0.5)
    first, second = llama.make(), llama.make()
    calibrate(first, config, sequences=8, length=8, own_text=file)
    assert load_file(file)["input_ids"].shape == (8, 8)
    calibrate(second, config, sequences=8, length=8, own_text=file)
    (a, *_), (b, *_) = (handed_over(model).narrow.values() for model in (first, second))
    assert torch.equal(a.weights.out_weight, b.weights.out_weight)
    for setting in ({"own_text": file}, {"length": 8}):
        with pytest.raises(ValueError, match="is of what the model samples.*give one of them"):
            calibrate(first, config, [llama.batch()] * 4, **setting)
