"""Checkpoints fused FFN by FFN: the bytes of those that are fused as a whole, with one FFN in memory at a time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME
from helpers import half
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_fusion import export
from peft_fusion.export import export_fused
from peft_fusion.tuner.build import narrow_projections

LLAMA = BY_NAME["llama"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Those of all shards: how they are shared out depends on the order in which transformers looks at them."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_the_bytes_of_a_model_fused_as_a_whole(architecture, tmp_path, unchanged):
    model = architecture.make()
    check = unchanged(model)
    export_fused(model, half(architecture), tmp_path / "by one" / "small", check=False)
    check()
    export(get_peft_model(model, half(architecture)), tmp_path / "whole" / "small", check=False)
    found, expected = files(tmp_path / "by one" / "small"), files(tmp_path / "whole" / "small")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert [path.name for path in (tmp_path / "by one").iterdir()] == ["small"]


@pytest.mark.parametrize("settings", [{"layers_to_transform": [1]}, {"method": "pruning"}, {"scale": "none"}], ids=str)
def test_with_settings(settings, tmp_path):
    model = LLAMA.make()
    export_fused(model, half(LLAMA, **settings), tmp_path / "one" / "small", check=False)
    export(get_peft_model(model, half(LLAMA, **settings)), tmp_path / "all" / "small", check=False)
    assert files(tmp_path / "one" / "small") == files(tmp_path / "all" / "small")


def test_read_from_disk(tmp_path):
    dtype = torch.bfloat16
    LLAMA.make().to(dtype).save_pretrained(tmp_path / "base", max_shard_size="30KB")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    there = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype="auto", device_map={"": "disk"}, offload_folder=tmp_path / "away"
    )
    assert all(parameter.is_meta for parameter in there.parameters())
    done = export_fused(there, half(LLAMA), tmp_path / "one" / "small", max_shard_size="20KB")
    assert done.difference < 1e-2
    assert all(parameter.is_meta for parameter in there.parameters())
    export(get_peft_model(whole, half(LLAMA)), tmp_path / "all" / "small", check=False, max_shard_size="20KB")
    found, expected = tensors(tmp_path / "one" / "small"), tensors(tmp_path / "all" / "small")
    assert found.keys() == expected.keys() and len(list((tmp_path / "one" / "small").glob("*.safetensors"))) == 3
    assert all(torch.equal(found[name], expected[name]) for name in expected)


REFUSED = [
    ({"method": "svd"}, "one by one"),
    ({"allocation": "fisher"}, "one by one"),
    ({"layers_to_transform": [7]}, "layers_to_transform"),
    ({"kernel": "fisher"}, "calibrat"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_refused_before_any_work(settings, message, tmp_path, unchanged):
    model = LLAMA.make()
    check = unchanged(model)
    with pytest.raises(ValueError, match=message):
        export_fused(model, half(LLAMA, **settings), tmp_path / "small")
    check()
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_an_adapter_is_refused(tmp_path):
    model = get_peft_model(LLAMA.make(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has adapters"):
        export_fused(model, half(LLAMA), tmp_path / "small")


def test_nothing_is_left_of_what_was_interrupted(tmp_path, unchanged, monkeypatch):
    model = LLAMA.make()
    check = unchanged(model)
    calls = []

    def interrupted(planned, recipe):
        calls.append(planned)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return narrow_projections(planned, recipe)

    monkeypatch.setattr(sys.modules["peft_fusion.export.fused"], "narrow_projections", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_fused(model, half(LLAMA), tmp_path / "small")
    check()
    assert list(tmp_path.iterdir()) == []
