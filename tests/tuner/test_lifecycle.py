"""The life of an adapter, for every layout: fuse, train, save, reload, merge, load as a stock model."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME
from helpers import half, logits, relative, train
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from peft_fusion import FusionConfig, fuse
from peft_fusion.tuner.layer import FusionLayer

every = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)


@every
def test_full_width_reproduces_the_original(architecture):
    model = architecture.make()
    before = logits(model, architecture)
    fused = get_peft_model(model, FusionConfig(ratio=1.0, task_type=architecture.task_type))
    assert relative(logits(fused, architecture), before) < 1e-5


@every
def test_half_width_halves_every_ffn(architecture):
    fused = get_peft_model(architecture.make(), half(architecture))
    layers = [m for m in fused.modules() if isinstance(m, FusionLayer) and "default" in m.config_widths]
    assert len(layers) == architecture.ffns
    for layer in layers:
        assert layer.mlp_fusion_narrow["default"].weight.shape[1] == architecture.width // 2


@every
def test_only_fused_weights_and_modules_to_save_change_in_training(architecture):
    fused = get_peft_model(architecture.make(), half(architecture))
    before = {name: p.detach().clone() for name, p in fused.named_parameters()}
    train(fused, architecture)
    for name, parameter in fused.named_parameters():
        trains = "mlp_fusion_narrow" in name or ".modules_to_save." in name
        assert torch.equal(parameter, before[name]) != trains, name


@every
def test_saved_adapter_reloads_bit_identically(architecture, tmp_path):
    fused = get_peft_model(architecture.make(), half(architecture))
    train(fused, architecture)
    expected = logits(fused, architecture)
    fused.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    reloaded = PeftModel.from_pretrained(architecture.make(), tmp_path)
    assert torch.equal(logits(reloaded, architecture), expected)
    assert not any(p.requires_grad for p in reloaded.parameters())


@every
def test_merged_model_is_a_stock_checkpoint(architecture, tmp_path):
    fused = get_peft_model(architecture.make(), half(architecture))
    train(fused, architecture)
    expected = logits(fused, architecture)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merged = fused.merge_and_unload()
    assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())
    assert relative(logits(merged, architecture), expected) < 1e-5
    merged.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config[architecture.attribute] == architecture.width // 2
    stock, info = type(merged).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert relative(logits(stock, architecture), expected) < 1e-5


@every
def test_merge_and_unmerge_adapter(architecture):
    model = architecture.make()
    original = logits(model, architecture)
    fused = get_peft_model(model, half(architecture))
    expected = logits(fused, architecture)
    fused.merge_adapter()
    fused.merge_adapter()  # merging is idempotent
    assert relative(logits(fused, architecture), expected) < 1e-5
    fused.unmerge_adapter()
    assert torch.equal(logits(fused, architecture), expected)
    with fused.disable_adapter():
        assert torch.equal(logits(fused, architecture), original)
    fused.merge_adapter()
    with fused.disable_adapter():
        assert torch.equal(logits(fused, architecture), original)


@every
def test_unload_gives_the_original_back(architecture):
    model = architecture.make()
    original, keys = logits(model, architecture), list(model.state_dict())
    width = getattr(model.config, architecture.attribute)
    fused = get_peft_model(model, half(architecture))
    train(fused, architecture)
    unloaded = fused.unload()
    assert list(unloaded.state_dict()) == keys
    assert getattr(unloaded.config, architecture.attribute) == width
    if architecture.task_type != "SEQ_CLS":  # unloading keeps a trained classifier, as with LoRA
        assert torch.equal(logits(unloaded, architecture), original)


@every
def test_several_adapters(architecture):
    fused = get_peft_model(architecture.make(), half(architecture))
    first = logits(fused, architecture)
    fused.add_adapter("quarter", FusionConfig(ratio=0.25, task_type=architecture.task_type))
    assert torch.equal(logits(fused, architecture), first)
    fused.set_adapter("quarter")
    second = logits(fused, architecture)
    assert not torch.allclose(first, second)
    with pytest.raises(ValueError, match="cannot be active or merged together"):
        fused.base_model.set_adapter(["default", "quarter"])
    assert torch.equal(logits(fused, architecture), second)
    fused.delete_adapter("quarter")
    fused.set_adapter("default")
    assert torch.equal(logits(fused, architecture), first)


@every
def test_fuse_leaves_a_plain_trainable_model(architecture, tmp_path):
    model = architecture.make()
    fused = logits(get_peft_model(architecture.make(), half(architecture)), architecture)
    model = fuse(model, half(architecture))
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config")
    assert relative(logits(model, architecture), fused) < 1e-5
    model.save_pretrained(tmp_path)
    assert relative(logits(type(model).from_pretrained(tmp_path), architecture), fused) < 1e-5


@every
def test_loading_never_clusters(architecture, tmp_path, monkeypatch):
    fused = get_peft_model(architecture.make(), half(architecture))
    fused.save_pretrained(tmp_path)

    def clustering(*args, **kwargs):
        raise AssertionError("loading clustered")

    monkeypatch.setattr("peft_fusion.tuner.make.fused_projections", clustering)
    monkeypatch.setattr("peft_fusion.fusing.methods.fusion.kernel_kmeans", clustering)
    with pytest.raises(AssertionError, match="loading clustered"):
        get_peft_model(architecture.make(), half(architecture))
    for low_cpu_mem_usage in (False, True):
        reloaded = PeftModel.from_pretrained(architecture.make(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(reloaded, architecture), logits(fused, architecture))
    native = architecture.make()
    native.load_adapter(str(tmp_path))
    if architecture.task_type != "SEQ_CLS":
        assert torch.equal(logits(native, architecture), logits(fused, architecture))


def test_auto_class_and_second_adapter_load(tmp_path):
    llama = BY_NAME["llama"]
    llama.make().save_pretrained(tmp_path / "base")
    base = type(llama.make()).from_pretrained(tmp_path / "base")
    fused = get_peft_model(base, half(llama))
    expected = logits(fused, llama)
    fused.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), llama), expected)
    other = get_peft_model(llama.make(), FusionConfig(ratio=0.25, task_type="CAUSAL_LM"))
    other.load_adapter(tmp_path / "adapter", "second")
    other.set_adapter("second")
    assert torch.equal(logits(other, llama), expected)


def test_same_seed_gives_the_same_result():
    bert = BY_NAME["bert"]
    first, second = (get_peft_model(bert.make(), half(bert, seed=5)).state_dict() for _ in range(2))
    narrow = [name for name in first if "mlp_fusion_narrow" in name]
    assert narrow and all(torch.equal(first[name], second[name]) for name in narrow)


def test_safe_merge_refuses_nan():
    fused = get_peft_model(BY_NAME["llama"].make(), half(BY_NAME["llama"]))
    next(p for n, p in fused.named_parameters() if "mlp_fusion_narrow" in n).data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        fused.merge_adapter(safe_merge=True)


def test_partly_fused_model_merges_with_a_warning():
    llama = BY_NAME["llama"]
    fused = get_peft_model(llama.make(), half(llama, layers_to_transform=[1, 2]))
    expected = logits(fused, llama)
    with pytest.warns(UserWarning, match="different widths"):
        merged = fused.merge_and_unload()
    assert merged.config.intermediate_size == 64
    assert relative(logits(merged, llama), expected) < 1e-5


def test_scale_none_folds_the_counts():
    bert = BY_NAME["bert"]
    counts = get_peft_model(bert.make(), half(bert))
    folded = get_peft_model(bert.make(), half(bert, scale="none"))
    assert relative(logits(folded, bert), logits(counts, bert)) < 1e-5
    assert any(name.endswith(".scale") for name in counts.state_dict())
    assert not any(name.endswith(".scale") for name in folded.state_dict())


def test_random_weights_without_clustering(monkeypatch):
    def clustering(*args, **kwargs):
        raise AssertionError("clustered")

    monkeypatch.setattr("peft_fusion.tuner.make.fused_projections", clustering)
    bert = BY_NAME["bert"]
    model = bert.make()
    original = logits(model, bert)
    fused = get_peft_model(model, half(bert, init_weights=False))
    assert torch.isfinite(logits(fused, bert)).all()
    assert not torch.allclose(logits(fused, bert), original)


@pytest.mark.parametrize(("name", "attention"), [("bert", "attention"), ("llama", "self_attn")])
def test_the_attention_can_train_beside_the_ffns(name, attention, tmp_path):
    architecture = BY_NAME[name]
    fused = get_peft_model(architecture.make(), half(architecture, modules_to_save=[attention]))
    before = {key: p.detach().clone() for key, p in fused.named_parameters() if f"{attention}.modules_to_save" in key}
    assert before
    train(fused, architecture)
    # a bias on the keys shifts all of a query's scores alike: its gradient is zero but for rounding
    moved = [not torch.equal(p, before[key]) for key, p in fused.named_parameters() if key in before]
    assert sum(moved) > 0.8 * len(moved)
    expected = logits(fused, architecture)
    fused.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(architecture.make(), tmp_path / "adapter")
    assert torch.equal(logits(reloaded, architecture), expected)
    merged = fused.merge_and_unload()
    assert relative(logits(merged, architecture), expected) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    assert relative(logits(type(merged).from_pretrained(tmp_path / "merged"), architecture), expected) < 1e-5
