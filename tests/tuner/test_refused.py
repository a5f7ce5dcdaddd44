"""Wrong input: a clear error that names the field or the tensor, and a model that is as it was."""

from __future__ import annotations

import pytest
import torch
from architectures import BY_NAME
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from peft_fusion import FusionConfig, fuse

REFUSED = {
    "width above the full one": ("llama", {"intermediate_size": 65}, "has 64 neurons and cannot be given 65"),
    "no such target": (
        "llama",
        {"target_modules": ["nosuch"]},
        r"matches no FFN. Found 3 FFNs: model.layers.0.mlp",
    ),
    "no such regex": ("llama", {"target_modules": r".*nosuch"}, "matches no FFN"),
    "empty target": ("llama", {"target_modules": []}, "`target_modules` has .* matches no FFN"),
    "one target not an FFN": (
        "bert",
        {"target_modules": ["encoder.layer.0", "query"]},
        "'query', which matches no FFN",
    ),
    "half an FFN": (
        "llama",
        {"target_modules": ["up_proj", "down_proj"]},
        r"not \['model.layers.0.mlp.gate_proj'\]",
    ),
    "half a BERT FFN": ("bert", {"target_modules": ["output.dense"]}, "intermediate.dense"),
    "half an FFN excluded": (
        "gpt2",
        {"exclude_modules": ["c_fc"]},
        "`exclude_modules`.* names .*c_fc.* but not .*c_proj",
    ),
    "exclude matches nothing": ("gpt2", {"exclude_modules": ["nosuch"]}, "`exclude_modules` has 'nosuch'"),
    "all excluded": ("gpt2", {"exclude_modules": ["mlp"]}, "No FFN is left to fuse"),
    "layer out of range": (
        "llama",
        {"layers_to_transform": [1, 3]},
        r"has \[3\], but .* in layers \[0, 1, 2\]",
    ),
    "no such pattern": (
        "llama",
        {"layers_to_transform": 1, "layers_pattern": "h"},
        r"has \[1\], but .* in layers \[\] of `layers_pattern`='h'",
    ),
    "width_pattern matches nothing": (
        "llama",
        {"width_pattern": {"fc1": 8}},
        "`width_pattern` has the key 'fc1'",
    ),
    "width_pattern above": ("llama", {"width_pattern": {"mlp": 80}}, "cannot be given 80"),
    "modules_to_save matches nothing": (
        "llama",
        {"modules_to_save": ["nosuch"]},
        "`modules_to_save` has 'nosuch'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("how", ["get_peft_model", "inject", "add_adapter", "fuse"])
def test_refused_configuration_leaves_the_model_unchanged(case, how, unchanged):
    name, settings, message = REFUSED[case]
    model = BY_NAME[name].make()
    check = unchanged(model)
    config = FusionConfig(**settings)
    with pytest.raises(ValueError, match=message):
        if how == "get_peft_model":
            get_peft_model(model, config)
        elif how == "inject":
            inject_adapter_in_model(config, model)
        elif how == "fuse":
            fuse(model, config)
        else:
            model.add_adapter(config)
    check()


def test_refused_second_adapter_leaves_the_first(unchanged):
    llama = BY_NAME["llama"]
    model = get_peft_model(llama.make(), FusionConfig(ratio=0.5))
    check = unchanged(model)
    with pytest.raises(ValueError, match="cannot be given 65"):
        model.add_adapter("second", FusionConfig(intermediate_size=65))
    check()


def test_model_without_ffns():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(ValueError, match="Sequential has no FFN of a layout that is known"):
        get_peft_model(model, FusionConfig())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "tensor"),
    [("llama", "up_proj.weight"), ("phi3", "gate_up_proj.weight"), ("bert", "output.dense.bias")],
)
def test_weights_that_are_not_finite(name, tensor, value, unchanged):
    model = BY_NAME[name].make()
    parameter = next(
        p for n, p in reversed(list(model.named_parameters())) if n.endswith(tensor) and "attention" not in n
    )
    parameter.data.view(-1)[3] = value
    check = unchanged(model)
    with pytest.raises(ValueError, match=f"{tensor}` holds NaN or infinite values"):
        get_peft_model(model, FusionConfig())
    check()


def test_meta_weights():
    with torch.device("meta"):
        model = LlamaForCausalLM(BY_NAME["llama"].config())
    with pytest.raises(ValueError, match="cannot be read as a floating-point matrix"):
        get_peft_model(model, FusionConfig())


def test_ffn_that_computes_across_its_neurons(unchanged):
    model = BY_NAME["opt"].make()
    model.model.decoder.layers[1].ffn_layernorm = nn.LayerNorm(64)
    check = unchanged(model)
    with pytest.raises(ValueError, match="`ffn_layernorm` computes across its neurons"):
        get_peft_model(model, FusionConfig())
    check()
    get_peft_model(model, FusionConfig(exclude_modules=["layers.1"]))


@pytest.mark.parametrize("place", ["model.layers.2.mlp.up_proj", "model.alias"])
def test_projection_that_is_held_in_two_places(place, unchanged):
    model = BY_NAME["llama"].make()
    model.set_submodule(place, model.model.layers[0].mlp.up_proj)
    check = unchanged(model)
    for how in (get_peft_model, fuse):
        with pytest.raises(ValueError, match="` and `.*` are one and the same module.*..copy.deepcopy`") as refused:
            how(model, FusionConfig(ratio=0.5))
        assert f"`{place}`" in str(refused.value) and "`model.layers.0.mlp.up_proj`" in str(refused.value)
        check()
    get_peft_model(model, FusionConfig(ratio=0.5, exclude_modules=["layers.0.mlp", "layers.2.mlp"]))


def test_block_that_two_depths_share_is_fused_once():
    model = BY_NAME["llama"].make()
    model.model.layers[2] = model.model.layers[0]
    full = model(**BY_NAME["llama"].batch()).logits
    fused = get_peft_model(model, FusionConfig(ratio=1.0))
    assert len(fused.peft_config["default"].fused_widths) == 2
    torch.testing.assert_close(fused(**BY_NAME["llama"].batch()).logits, full)


def test_fusion_over_lora_is_refused():
    model = get_peft_model(BY_NAME["llama"].make(), LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="up_proj` already carries an adapter .* Merge that adapter first"):
        inject_adapter_in_model(FusionConfig(), model.base_model.model, "ffn")


def test_same_adapter_name_is_refused():
    model = BY_NAME["llama"].make()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "default")
    with pytest.raises(ValueError, match="already has an adapter named 'default'"):
        inject_adapter_in_model(FusionConfig(), model, "default")


@pytest.fixture
def saved(tmp_path):
    """A saved adapter of a tiny BERT classifier."""
    get_peft_model(BY_NAME["bert"].make(), FusionConfig(ratio=0.5, task_type="SEQ_CLS")).save_pretrained(tmp_path)
    return tmp_path


def load_with_peft(model, path):
    return PeftModel.from_pretrained(model, path)


def load_with_config(model, path):
    return PeftModel.from_pretrained(model, path, config=PeftConfig.from_pretrained(path))


def load_with_transformers(model, path):
    return model.load_adapter(str(path))


@pytest.mark.parametrize("load", [load_with_peft, load_with_config, load_with_transformers])
@pytest.mark.parametrize("damage", ["truncated", "missing", "missing head", "misshapen", "wider", "deeper", "larger"])
def test_adapter_that_is_damaged_or_of_another_model(saved, damage, load, unchanged):
    bert = BY_NAME["bert"]
    file = saved / "adapter_model.safetensors"
    tensors, changes = load_file(file), {}
    name = "base_model.model.bert.encoder.layer.1.output.dense.mlp_fusion_narrow.weight"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        message = "is damaged or incomplete"
    elif damage == "missing":
        del tensors[name]
        message = f"lacks the tensor '{name}' of shape"
    elif damage == "missing head":
        del tensors["base_model.model.classifier.weight"]
        message = "lacks the tensor 'base_model.model.classifier.weight'"
    elif damage == "misshapen":
        tensors[name] = tensors[name][:, :-1].contiguous()
        message = r"of shape \(32, 31\), but this model needs \(32, 32\)"
    elif damage == "wider":
        changes, message = (
            {"intermediate_size": 128},
            "from 64 to 32 neurons, but this model has 128 neurons there",
        )
    elif damage == "deeper":
        changes, message = {"num_hidden_layers": 1}, "has no such FFN"
    else:
        changes, message = {"hidden_size": 64}, r"but this model needs"
    if damage.startswith("mis"):
        save_file(tensors, file)
    model = bert.make(**changes)
    check = unchanged(model)
    with pytest.raises(ValueError, match=message):
        load(model, saved)
    check()


def test_two_fusion_adapters_cannot_be_active_together():
    model = BY_NAME["llama"].make()
    model.add_adapter(FusionConfig(ratio=0.5), "first")
    model.add_adapter(FusionConfig(ratio=0.25), "second")
    with pytest.raises(ValueError, match="cannot be active or merged together"):
        model.set_adapter(["first", "second"])
