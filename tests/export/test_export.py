"""`export`: what it writes, what it refuses, and that the model is left alone."""

from __future__ import annotations

import json
import sys
from functools import partial

import pytest
import torch
import transformers as tf
from architectures import BY_NAME, TEXT
from helpers import half
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from peft_fusion import FusionConfig, export, fuse
from peft_fusion.export import check as checking

LLAMA = BY_NAME["llama"]
unchecked = partial(export, check=False)
ROOM = sys.modules["peft_fusion.export"]  # whose name is the function's as well


def fused(layers=None, name="llama", **kwargs):
    architecture = BY_NAME[name]
    return get_peft_model(architecture.make(), half(architecture, layers_to_transform=layers, **kwargs))


def tokenizer():
    words = {"[UNK]": 0, **{str(number): number for number in range(1, 9)}}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), unk_token="[UNK]"
    )


def test_one_width_is_a_stock_checkpoint_with_all_that_belongs_to_it(tmp_path, unchanged):
    model = fused()
    check = unchanged(model)
    done = export(model, tmp_path / "small", tokenizer=tokenizer(), fidelity="error 0.125")
    check()
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json"} <= names
    assert not any(name.endswith(".py") for name in names) and not done.needs_code
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert (done.loaded_by, done.difference < 1e-5) == ("AutoModelForCausalLM", True)
    assert done.widths["model.layers.0.mlp"] == (64, 32)
    assert done.parameters == (
        LLAMA.make().num_parameters(),
        tf.LlamaForCausalLM.from_pretrained(done.directory).num_parameters(),
    )
    card = (tmp_path / "small" / "README.md").read_text()
    for told in (
        "| `model.layers.2.mlp` | 64 | 32 |",
        "error 0.125",
        "method: fusion",
        "kernel: weights",
        "%)",
    ):
        assert told in card


def test_widths_that_differ_come_with_their_code(tmp_path, unchanged):
    model = fused([1])
    check = unchanged(model)
    done = unchecked(model, tmp_path / "small")
    check()
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["architectures"] == ["NarrowLlamaForCausalLM"] and config["intermediate_size"] == 64
    assert config["per_layer_config"]["1"] == {"intermediate_size": 32}
    assert config["auto_map"]["AutoModel"] == "modeling_narrow.NarrowLlamaModel"
    assert done.needs_code and "trust_remote_code=True" in (tmp_path / "small" / "README.md").read_text()
    assert "peft_fusion" not in (tmp_path / "small" / "modeling_narrow.py").read_text()


def test_a_fused_plain_model_and_what_was_exported_before(tmp_path):
    plain = fuse(LLAMA.make(), half(LLAMA, layers_to_transform=[1]))
    first = unchecked(plain, tmp_path / "first")
    again = tf.AutoModelForCausalLM.from_pretrained(first.directory, trust_remote_code=True)
    assert torch.equal(
        again.get_submodule("model.layers.1.mlp.up_proj").weight, plain.model.layers[1].mlp.up_proj.weight
    )
    second = unchecked(again, tmp_path / "second")
    for file in ("config.json", "modeling_narrow.py"):
        assert (tmp_path / "second" / file).read_text() == (tmp_path / "first" / file).read_text()
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    third = fuse(again, FusionConfig(target_modules=["layers.2.mlp"], intermediate_size=16))
    widths = json.loads((tmp_path / "second" / "config.json").read_text())["per_layer_config"]
    unchecked(third, tmp_path / "third")
    told = json.loads((tmp_path / "third" / "config.json").read_text())["per_layer_config"]
    assert told == {**widths, "2": {"intermediate_size": 16}}
    assert second.needs_code


def test_layers_that_were_built_anew_are_as_good_as_the_others(tmp_path):
    done = unchecked(fused([1]), tmp_path / "small")
    loaded = tf.AutoModelForCausalLM.from_pretrained(done.directory, trust_remote_code=True)
    assert all(module.config is loaded.config for module in loaded.modules() if hasattr(module, "config"))
    config = tf.AutoConfig.from_pretrained(done.directory)
    made = tf.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    deviations = [float(layer.mlp.up_proj.weight.std()) for layer in made.model.layers]
    assert deviations == pytest.approx([config.initializer_range] * 3, rel=0.15)
    headless = tf.AutoModel.from_pretrained(done.directory, trust_remote_code=True)
    assert type(headless).__name__ == "NarrowLlamaModel"
    assert torch.equal(headless.layers[1].mlp.up_proj.weight, loaded.model.layers[1].mlp.up_proj.weight)


def test_embeddings_that_training_has_parted(tmp_path):
    model = get_peft_model(LLAMA.make(tie_word_embeddings=True), half(LLAMA, modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    done = unchecked(model, tmp_path / "small")
    plain = tf.AutoModelForCausalLM.from_pretrained(done.directory).eval()
    expected = model.eval()(**LLAMA.batch()).logits
    torch.testing.assert_close(plain(**LLAMA.batch()).logits, expected, atol=1e-5, rtol=1e-4)


def test_lora_beside_fusion_is_merged_as_well(tmp_path, unchanged):
    model = get_peft_model(LLAMA.make(), half(LLAMA), adapter_name="fusion", mixed=True)
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.set_adapter(["fusion", "lora"])
    check = unchanged(model)
    expected = checking.outputs_to_match(model.base_model.model, LLAMA.batch())
    done = unchecked(model, tmp_path / "small")
    check()
    merged = tf.AutoModelForCausalLM.from_pretrained(done.directory).eval()
    torch.testing.assert_close(merged(**LLAMA.batch()).logits, expected, atol=1e-5, rtol=1e-4)
    assert "merged as well: LORA" in (tmp_path / "small" / "README.md").read_text()


@pytest.mark.parametrize("state", ["merged", "native", "wrapped", "discard", "offload", "trained head"])
def test_whatever_state_the_adapter_is_in(tmp_path, unchanged, state):
    config = half(BY_NAME["bert"], base_weights=state if state in ("discard", "offload") else "keep")
    model = BY_NAME["bert"].make()
    if state == "native":
        model.add_adapter(config)
    else:
        model = get_peft_model(model, config)
    if state == "merged":
        model.merge_adapter()
    if state == "trained head":
        with torch.no_grad():
            model.base_model.model.classifier.modules_to_save["default"].weight.add_(1)
    if state == "wrapped":
        model = torch.nn.DataParallel(model)
    check, expected = unchanged(model), model.eval()(**BY_NAME["bert"].batch()).logits
    check = unchanged(model)
    done = unchecked(model, tmp_path / "small")
    check()
    plain = tf.AutoModelForSequenceClassification.from_pretrained(done.directory).eval()
    torch.testing.assert_close(plain(**BY_NAME["bert"].batch()).logits, expected, atol=1e-5, rtol=1e-4)


def test_half_precision_stays_half(tmp_path):
    model = get_peft_model(LLAMA.make().bfloat16(), half(LLAMA))
    unchecked(model, tmp_path / "small", max_shard_size="20KB")
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 1
    assert tf.AutoModelForCausalLM.from_pretrained(tmp_path / "small").dtype == torch.bfloat16


def disabled(model):
    model.base_model.disable_adapter_layers()
    return model


def inactive(model):
    model.base_model.set_adapter([])
    return model


def t5_of_two_lengths():
    model = BY_NAME["t5"].make(num_decoder_layers=3)
    with pytest.warns(UserWarning, match="could not be exported"):
        return get_peft_model(model, FusionConfig(ratio=0.5, layers_to_transform=[1]))


def bart():
    sizes = {
        "vocab_size": 99,
        "d_model": 32,
        "max_position_embeddings": 64,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 48,
    }
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 2, "decoder_layers": 2}
    model = tf.BartForConditionalGeneration(tf.BartConfig(**sizes, **heads))
    with pytest.warns(UserWarning, match="could not be exported"):
        return get_peft_model(model, FusionConfig(ratio=0.5, layers_to_transform=[1]))


def bloom():
    sizes = {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    return get_peft_model(tf.BloomForCausalLM(tf.BloomConfig(**sizes)), FusionConfig(ratio=0.5))


REFUSED = {
    "disabled": (lambda: disabled(fused()), "disabled"),
    "inactive": (lambda: inactive(fused()), "None of the fusion adapters"),
    "no transformers model": (lambda: torch.nn.Linear(2, 2), "checkpoints of transformers models"),
    "of another class": (lambda: type("Mine", (tf.LlamaForCausalLM,), {})(LLAMA.config()), "no model class of transf"),
    "meta": (lambda: fused().to("meta"), "has no weights"),
    "encoder longer than decoder": (
        t5_of_two_lengths,
        "num_hidden_layers",
    ),
    "halves with attributes of their own": (bart, "transformers cannot read such a BartConfig"),
    "no width in the config": (bloom, "no attribute for the width"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_before_any_work(tmp_path, unchanged, reason, monkeypatch):
    make, told = REFUSED[reason]
    model = make()
    check = unchanged(model)
    monkeypatch.setattr(ROOM, "merged_copy", None)
    with pytest.raises(ValueError, match=told):
        export(model, tmp_path / "small")
    check()
    assert list(tmp_path.iterdir()) == []


def test_layers_that_take_more_than_a_config_are_refused(tmp_path):
    sizes = {**TEXT, "intermediate_size": 64, "image_size": 16, "patch_size": 8, "drop_path_rate": 0.5}
    model = tf.BeitForImageClassification(tf.BeitConfig(**sizes)).eval()
    with pytest.warns(UserWarning, match="is not the layer that the model has"):
        mixed = get_peft_model(model, FusionConfig(ratio=0.5, layers_to_transform=[1]))
    with pytest.raises(ValueError, match="Fuse all of these FFNs to one width"):
        unchecked(mixed, tmp_path / "small")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("disk full"), MemoryError])
def test_whatever_ends_it_early_leaves_nothing(tmp_path, unchanged, monkeypatch, stop):
    model = fused([1])
    check = unchanged(model)

    def end(*args, **kwargs):
        raise stop

    monkeypatch.setattr(sys.modules["peft_fusion.export.written"], "card", end)
    with pytest.raises(type(stop) if isinstance(stop, OSError) else stop):
        unchecked(model, tmp_path / "small")
    check()
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_computes_something_else_is_not_left(tmp_path, monkeypatch):
    wrong = (torch.zeros(1, 16, 99), {})
    monkeypatch.setattr(checking, "reloaded", lambda *_: [wrong])
    with pytest.raises(RuntimeError, match="differ from the fused"):
        export(fused(), tmp_path / "small")
    monkeypatch.setattr(checking, "reloaded", lambda *_: [(wrong[0], {"missing_keys": ["lm_head.weight"]})])
    with pytest.raises(RuntimeError, match="lm_head.weight"):
        export(fused(), tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_of_the_model_it_was_made_of(tmp_path):
    LLAMA.make().save_pretrained(tmp_path / "base")
    model = get_peft_model(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), half(LLAMA))
    with pytest.raises(ValueError, match="must be a tokenizer"):
        unchecked(model, tmp_path / "small", tokenizer="base")
    with pytest.raises(ValueError, match="no tokenizer in the files"):
        unchecked(model, tmp_path / "small", tokenizer=True)
    tokenizer().save_pretrained(tmp_path / "base")
    unchecked(model, tmp_path / "small", tokenizer=True)
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "small").vocab_size == 9
    card = (tmp_path / "small" / "README.md").read_text()
    assert "A smaller `base`." in card and str(tmp_path) not in card and "base_model" not in card
