"""Conversion to gguf: what is ours of it, which is the label and the widths of mixed ones."""

from __future__ import annotations

import json
import os
import sys

import gguf
import numpy as np
import pytest
from architectures import BY_NAME
from helpers import half
from peft import get_peft_model

from peft_fusion import export

WIDTHS = [6, 2, 4]
CONVERTER = """import sys, pathlib
folder, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[3])
out.write_text((folder / "config.json").read_text())
"""


@pytest.fixture
def to_gguf(example):
    return example("to_gguf")


@pytest.fixture
def convert(to_gguf, tmp_path, monkeypatch):
    """Runs the script with a converter that writes down the config it is given."""
    (tmp_path / "converter.py").write_text(CONVERTER)

    def run(folder, converter="converter.py"):
        arguments = [str(folder), str(tmp_path / "out.gguf"), "--converter", str(tmp_path / converter)]
        monkeypatch.setattr(sys, "argv", ["to_gguf.py", *arguments])
        to_gguf.main()

    return run


def exported(folder, name="llama", layers=None):
    architecture = BY_NAME[name]
    model = get_peft_model(architecture.make(), half(architecture, layers_to_transform=layers))
    export(model, folder, check=False)


def llama_file(path):
    """A gguf file as the converter writes it: labelled as a Llama of one width."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_feed_forward_length(6)
    writer.add_rope_freq_base(100.0)
    writer.add_token_list(["a", "b"])
    for layer, width in enumerate(WIDTHS):
        weight = np.arange(width * 8, dtype=np.float32).reshape(width, 8)
        writer.add_tensor(f"blk.{layer}.ffn_up.weight", weight)
        writer.add_tensor(f"blk.{layer}.ffn_down.weight", weight.T.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_relabelled_with_the_width_of_each_layer(to_gguf, tmp_path):
    llama_file(tmp_path / "llama.gguf")
    to_gguf.as_deci(tmp_path / "llama.gguf", tmp_path / "deci.gguf")
    before, after = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("llama", "deci"))
    told = {name: field.contents() for name, field in after.fields.items()}
    assert told["general.architecture"] == "deci" and told["deci.feed_forward_length"] == WIDTHS
    assert told["deci.block_count"] == 3 and told["deci.rope.freq_base"] == 100.0
    assert told["tokenizer.ggml.tokens"] == ["a", "b"] and not any(name.startswith("llama.") for name in told)
    assert [tensor.name for tensor in after.tensors] == [tensor.name for tensor in before.tensors]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert np.array_equal(old.data, new.data)


def test_one_width_is_left_to_the_converter(convert, tmp_path):
    exported(tmp_path / "small")
    convert(tmp_path / "small")
    assert (tmp_path / "out.gguf").read_text() == (tmp_path / "small" / "config.json").read_text()
    assert sorted(os.listdir(tmp_path)) == ["converter.py", "out.gguf", "small"]


def test_mixed_widths_reach_it_as_the_stock_class(convert, to_gguf, monkeypatch, tmp_path):
    exported(tmp_path / "small", layers=[1])
    monkeypatch.setattr(to_gguf, "as_deci", lambda source, target: target.write_bytes(source.read_bytes()))
    convert(tmp_path / "small")
    given = json.loads((tmp_path / "out.gguf").read_text())
    assert given["architectures"] == ["LlamaForCausalLM"] and given["intermediate_size"] == 64
    assert not given.keys() & {"auto_map", "per_layer_config"}


def test_what_cannot_be_converted(convert, to_gguf, tmp_path):
    (tmp_path / "broken.py").write_text("raise SystemExit('no such model')")
    exported(tmp_path / "small")
    exported(tmp_path / "other", "qwen3", [1])
    for folder, converter, told in (
        ("nowhere", "converter.py", "no config.json"),
        ("small", "nowhere.py", "no such file"),
        ("small", "broken.py", "the converter failed: no such model"),
        ("other", "converter.py", "not in qwen3: fuse all FFNs to one width"),
    ):
        with pytest.raises(to_gguf.InputError, match=told):
            convert(tmp_path / folder, converter)
    assert not (tmp_path / "out.gguf").exists()
    convert(tmp_path / "small")
    with pytest.raises(to_gguf.InputError, match="exists already"):
        convert(tmp_path / "small")
