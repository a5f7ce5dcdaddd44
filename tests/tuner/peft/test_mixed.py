"""LoRA beside fusion, each way there is: trained, saved, reloaded, merged to a stock model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from adapters import MERGED, narrow_weights
from architectures import ARCHITECTURES, BY_NAME, Architecture
from helpers import half, logits, relative, train
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_fusion import FusionConfig, fuse
from peft_fusion.tuner.layer import FusionLayer
from peft_fusion.tuner.mixed import load_mixed, save_mixed

ATTENTION = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "modernbert": ["Wqkv"],
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "t5": ["q", "v"],
    "t5_gated": ["q", "v"],
    "phi3": ["qkv_proj"],
}


def attention(architecture: Architecture, **kwargs) -> LoraConfig:
    """LoRA on the attention, started away from zero so that it does something at once."""
    targets = ATTENTION.get(architecture.name, ["q_proj", "v_proj"])
    return LoraConfig(target_modules=targets, r=4, init_lora_weights=False, **kwargs)


def mixed(architecture: Architecture, **kwargs) -> nn.Module:
    model = get_peft_model(architecture.make(), half(architecture, **kwargs), "ffn", mixed=True)
    model.add_adapter("attn", attention(architecture))
    model.set_adapter(["ffn", "attn"])
    return model


def mixed_the_other_way_round(architecture: Architecture) -> nn.Module:
    model = get_peft_model(architecture.make(), attention(architecture), "attn", mixed=True)
    model.add_adapter("ffn", half(architecture))
    model.set_adapter(["ffn", "attn"])
    return model


def injected(architecture: Architecture) -> nn.Module:
    model = inject_adapter_in_model(half(architecture), architecture.make(), "ffn")
    return get_peft_model(model, attention(architecture), "attn")


def transformers_native(architecture: Architecture) -> nn.Module:
    model = architecture.make()
    model.add_adapter(FusionConfig(ratio=0.5), "ffn")  # with a task type its classifier could not be active with two
    model.add_adapter(attention(architecture), "attn")
    model.set_adapter(["ffn", "attn"])
    return model


WAYS = [mixed, mixed_the_other_way_round, injected, transformers_native]
every = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda w: w.__name__)


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@every
@each_way
def test_both_train_are_saved_reloaded_and_merged(architecture, way, tmp_path):
    model = way(architecture)
    before = trainable(model)
    assert sum("lora_" in name for name in before) and sum("mlp_fusion_" in name for name in before)
    train(model, architecture)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in trainable(model).items())
    expected = logits(model, architecture)
    save_mixed(model, tmp_path)
    reloaded = load_mixed(architecture.make(), tmp_path)
    assert isinstance(reloaded, PeftMixedModel) and not any(p.requires_grad for p in reloaded.parameters())
    assert torch.equal(logits(reloaded, architecture), expected)
    for merging in (reloaded, model) if way is not transformers_native else (reloaded,):
        merged = merging.merge_and_unload()
        assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
        assert relative(logits(merged, architecture), expected) < MERGED
        assert getattr(merged.config, architecture.attribute) == architecture.width // 2
    merged.save_pretrained(tmp_path / "stock")
    stock = type(merged).from_pretrained(tmp_path / "stock")
    assert relative(logits(stock, architecture), expected) < MERGED


@every
def test_mixed_adapters_are_switched_disabled_and_merged(architecture):
    model = architecture.make()
    original = logits(model, architecture)
    alone = logits(get_peft_model(architecture.make(), half(architecture)), architecture)
    model = mixed(architecture, base_weights="offload")
    both = logits(model, architecture)
    assert not torch.allclose(both, original)
    with model.disable_adapter():
        assert torch.equal(logits(model, architecture), original)
    assert torch.equal(logits(model, architecture), both)
    model.set_adapter("ffn")
    assert torch.equal(logits(model, architecture), alone)
    assert not any("lora_" in name for name in trainable(model))
    model.set_adapter("attn")
    lora = logits(model, architecture)
    assert not any("mlp_fusion_" in name for name in trainable(model))
    model.set_adapter(["ffn", "attn"])
    model.base_model.merge_adapter()
    assert relative(logits(model, architecture), both) < MERGED
    model.base_model.unmerge_adapter()
    assert relative(logits(model, architecture), both) < MERGED
    model.delete_adapter("ffn")
    assert relative(logits(model, architecture), lora) < MERGED
    assert relative(logits(model.unload(), architecture), original) < MERGED


def test_adapters_of_a_mixed_model_load_on_their_own(tmp_path):
    llama = BY_NAME["llama"]
    model = mixed(llama)
    train(model, llama)
    save_mixed(model, tmp_path)
    assert json.loads((tmp_path / "mixed_adapters.json").read_text()) == {
        "adapters": ["ffn", "attn"],
        "active": ["ffn", "attn"],
    }
    model.set_adapter("ffn")
    assert torch.equal(logits(PeftModel.from_pretrained(llama.make(), tmp_path / "ffn"), llama), logits(model, llama))
    model.set_adapter("attn")
    assert torch.equal(logits(PeftModel.from_pretrained(llama.make(), tmp_path / "attn"), llama), logits(model, llama))


def test_trained_classifier_goes_with_one_of_the_two(tmp_path):
    bert = BY_NAME["bert"]
    model = get_peft_model(bert.make(), FusionConfig(ratio=0.5), "ffn", mixed=True)
    model.add_adapter("attn", attention(bert, modules_to_save=["classifier"]))
    model.set_adapter(["ffn", "attn"])
    before = trainable(model)
    assert "base_model.model.classifier.modules_to_save.attn.weight" in before
    train(model, bert)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in trainable(model).items())
    expected = logits(model, bert)
    save_mixed(model, tmp_path)
    reloaded = load_mixed(bert.make(), tmp_path, is_trainable=True)
    assert torch.equal(logits(reloaded, bert), expected)
    assert trainable(reloaded).keys() == trainable(model).keys()
    assert relative(logits(reloaded.merge_and_unload(), bert), expected) < MERGED


RELOAD = """
import sys, torch
sys.path[:0] = {path!r}
import peft_fusion
from architectures import BY_NAME
from peft_fusion.tuner.mixed import load_mixed
from helpers import logits
torch.set_num_threads(1)
llama = BY_NAME["llama"]
torch.save(logits(load_mixed(llama.make(), sys.argv[1]), llama), sys.argv[1] + "/outputs.pt")
"""


def test_a_fresh_process_reloads_bit_identically(tmp_path):
    llama = BY_NAME["llama"]
    model = mixed(llama)
    train(model, llama)
    save_mixed(model, tmp_path)
    subprocess.run([sys.executable, "-c", RELOAD.format(path=sys.path), str(tmp_path)], check=True)
    assert torch.equal(torch.load(tmp_path / "outputs.pt"), logits(model, llama))


@every
def test_fusing_for_good_and_then_lora_on_everything(architecture, tmp_path):
    base = fuse(architecture.make(), half(architecture))
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", r=4, task_type=architecture.task_type))
    fused = [n for n, _ in model.named_parameters() if "lora_A" in n and "attn" not in n.lower()]
    assert len(fused) >= architecture.ffns * 2
    train(model, architecture)
    expected = logits(model, architecture)
    model.save_pretrained(tmp_path / "lora")
    narrow = type(base).from_pretrained(tmp_path / "base")
    assert relative(logits(PeftModel.from_pretrained(narrow, tmp_path / "lora"), architecture), expected) < 1e-6
    assert relative(logits(model.merge_and_unload(), architecture), expected) < MERGED


@every
def test_fused_ffns_frozen_and_lora_on_the_attention(architecture):
    model = mixed(architecture)
    model.base_model.set_requires_grad("ffn", False)
    assert all("lora_" in name or "modules_to_save" in name for name in trainable(model))
    before = [p.detach().clone() for p in narrow_weights(model, "ffn")]
    train(model, architecture)
    assert all(torch.equal(p, old) for p, old in zip(narrow_weights(model, "ffn"), before, strict=True))
    expected = logits(model, architecture)
    assert relative(logits(model.merge_and_unload(), architecture), expected) < MERGED


def refused_same_name(kind: str):
    model = BY_NAME["llama"].make()
    llama, lora, ffn = BY_NAME["llama"], attention(BY_NAME["llama"]), half(BY_NAME["llama"])
    if kind == "lora over fusion":
        model = inject_adapter_in_model(ffn, llama.make(), "same")
        return model, lambda: get_peft_model(model, lora, "same"), "already has an adapter named 'same'"
    if kind == "fusion over lora":
        model = inject_adapter_in_model(lora, llama.make(), "same")
        return model, lambda: get_peft_model(model, ffn, "same"), "already has an adapter named 'same'"
    if kind == "mixed":
        model = get_peft_model(model, ffn, "same", mixed=True)
        return model, lambda: model.add_adapter("same", lora), "'same' already exists"
    if kind == "wrapped twice":
        model = get_peft_model(model, ffn)
        return model, lambda: get_peft_model(model, lora), "already has an adapter named 'default'"
    if kind.startswith("lora on a fused projection"):
        lora = LoraConfig(target_modules=["q_proj", "up_proj"])
        message = r"names projections of fused FFNs: .*up_proj.*all-linear.*`peft_fusion.fuse"
        if kind.endswith("mixed"):
            model = get_peft_model(model, ffn, "ffn", mixed=True)
            return model, lambda: model.add_adapter("attn", lora), message
        model = inject_adapter_in_model(ffn, model, "ffn")
        if kind.endswith("native"):
            return model, lambda: inject_adapter_in_model(lora, model, "attn"), message
        return model, lambda: get_peft_model(model, lora, "attn"), message
    if kind == "fusion over lora's ffns":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"]), "attn", mixed=True)
        return model, lambda: model.add_adapter("ffn", ffn), "already carries an adapter .* Merge that adapter first"
    model = get_peft_model(model, ffn, "ffn", mixed=True)
    model.add_adapter("second", half(llama, seed=1))
    return model, lambda: model.set_adapter(["ffn", "second"]), "cannot be active or merged together"


@pytest.mark.parametrize(
    "kind",
    [
        "lora over fusion",
        "fusion over lora",
        "mixed",
        "wrapped twice",
        "lora on a fused projection",
        "lora on a fused projection, mixed",
        "lora on a fused projection, native",
        "fusion over lora's ffns",
        "two fusion adapters",
    ],
)
def test_unsafe_combinations_are_refused_and_change_nothing(kind):
    model, combine, message = refused_same_name(kind)
    modules = [(name, id(module)) for name, module in model.named_modules()]
    tensors = {
        name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.state_dict(keep_vars=True).items()
    }
    configs, expected = dict(model.peft_config), logits(model, BY_NAME["llama"])
    with pytest.raises(ValueError, match=message):
        combine()
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, tensors[name][0]) and tensor.requires_grad == tensors[name][1], name
    assert model.peft_config == configs
    assert torch.equal(logits(model, BY_NAME["llama"]), expected)


@every
def test_all_linear_leaves_fused_ffns_alone(architecture):
    model = inject_adapter_in_model(half(architecture), architecture.make(), "ffn")
    before = logits(model, architecture)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type=architecture.task_type), "attn")
    assert torch.equal(logits(model, architecture), before)
    adapted = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, FusionLayer)]
    assert adapted and not any(isinstance(m.base_layer, FusionLayer) for m in adapted)


def test_discarded_weights_in_a_mixed_model():
    llama = BY_NAME["llama"]
    model = mixed(llama, base_weights="discard")
    expected = logits(model, llama)
    for action in (model.base_model.disable_adapter_layers, model.unload):
        with pytest.raises(RuntimeError, match="were dropped"):
            action()
        assert torch.equal(logits(model, llama), expected)
    assert relative(logits(model.merge_and_unload(), llama), expected) < MERGED


def test_folders_and_models_without_adapters(tmp_path):
    with pytest.raises(ValueError, match="give a folder that `save_mixed` wrote"):
        load_mixed(BY_NAME["llama"].make(), tmp_path)
    with pytest.raises(ValueError, match="has no adapters to save"):
        save_mixed(BY_NAME["llama"].make(), tmp_path)
