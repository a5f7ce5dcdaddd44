"""Routed experts: fused, trained, saved, reloaded, merged and taken back, whatever way they are stored."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from helpers import half, logits, relative, train
from moes import DEEPSEEK, GPT_OSS, LLAMA4, MIXTRAL, MOES, QWEN2
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from peft_fusion import FusionConfig, calibrate, fuse, tune_layers
from peft_fusion.ffn import find_all, find_experts, read_experts
from peft_fusion.tuner.experts import ExpertsLayer, NarrowExperts
from peft_fusion.tuner.layer import FusionLayer

every = pytest.mark.parametrize("moe", MOES, ids=lambda a: a.name)
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def narrow_experts(model: nn.Module) -> list[NarrowExperts]:
    return [module for module in model.modules() if isinstance(module, NarrowExperts)]


@every
def test_full_width_reproduces_the_original(moe):
    model = moe.make()
    before = logits(model, moe)
    fused = get_peft_model(model, FusionConfig(ratio=1.0, task_type=moe.task_type))
    assert narrow_experts(fused) and relative(logits(fused, moe), before) < 1e-6


@every
def test_experts_whose_neurons_are_there_twice_are_reproduced_at_half_width(moe):
    model = moe.make()
    for experts in find_experts(model):
        for weights in read_experts(experts):
            for block in weights.blocks():  # views of the model's own
                block[1::2] = block[::2]
    before = logits(model, moe)
    fused = get_peft_model(model, half(moe, target_modules=["experts"]))
    for narrow in narrow_experts(fused):
        assert torch.equal(narrow.scale, torch.full_like(narrow.scale, 2))
    assert relative(logits(fused, moe), before) < 1e-6


@every
def test_every_ffn_gets_half_its_width_and_the_routers_stay(moe):
    model = moe.make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    widths = {ffn.name: ffn.width for ffn in find_all(model)}
    fused = get_peft_model(model, half(moe))
    assert len(widths) == moe.ffns
    assert fused.peft_config["default"].fused_widths == {name: [width, width // 2] for name, width in widths.items()}
    base = {name.replace(".base_layer", ""): tensor for name, tensor in fused.get_base_model().state_dict().items()}
    assert all(torch.equal(base[name], tensor) for name, tensor in before.items())


@every
def test_only_narrow_weights_train(moe):
    fused = get_peft_model(moe.make(), half(moe))
    before = {name: p.detach().clone() for name, p in fused.named_parameters()}
    scales = [narrow.scale.clone() for narrow in narrow_experts(fused)]
    train(fused, moe)
    for name, parameter in fused.named_parameters():
        assert torch.equal(parameter, before[name]) != ("mlp_fusion_narrow" in name), name
    assert all(torch.equal(narrow.scale, scale) for narrow, scale in zip(narrow_experts(fused), scales, strict=True))


@every
def test_saved_adapter_reloads_bit_identically(moe, tmp_path, monkeypatch):
    fused = get_peft_model(moe.make(), half(moe))
    train(fused, moe)
    expected = logits(fused, moe)
    fused.save_pretrained(tmp_path)
    monkeypatch.setattr("peft_fusion.tuner.build_experts.narrow_by", None)  # loading never clusters
    for low_cpu_mem_usage in (False, True):
        reloaded = PeftModel.from_pretrained(moe.make(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(reloaded, moe), expected)
    native = moe.make()
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native, moe), expected)


@every
def test_merged_model_is_a_stock_checkpoint(moe, tmp_path):
    model = moe.make()
    fused = get_peft_model(model, half(moe))
    train(fused, moe)
    expected = logits(fused, moe)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merged = fused.merge_and_unload()
    assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())
    folded = logits(merged, moe)
    assert relative(folded, expected) < 1e-5
    merged.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())[moe.attribute] == moe.width // 2
    stock, info = type(merged).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits(stock, moe), folded)


@every
def test_merge_unmerge_disable_and_unload(moe):
    model = moe.make()
    original, keys = logits(model, moe), list(model.state_dict())
    fused = get_peft_model(model, half(moe))
    expected = logits(fused, moe)
    fused.merge_adapter(safe_merge=True)
    fused.merge_adapter()
    assert relative(logits(fused, moe), expected) < 1e-5
    with fused.disable_adapter():
        assert torch.equal(logits(fused, moe), original)
    fused.unmerge_adapter()
    assert torch.equal(logits(fused, moe), expected)
    with fused.disable_adapter():
        assert torch.equal(logits(fused, moe), original)
    unloaded = fused.unload()
    assert list(unloaded.state_dict()) == keys and torch.equal(logits(unloaded, moe), original)


@pytest.mark.parametrize("moe", [moe for moe in MOES if moe is not LLAMA4], ids=lambda a: a.name)  # it has one only
def test_implementations_agree(moe):
    model = moe.make()
    fused = get_peft_model(model, half(moe))
    found, gradients = [], []
    for implementation in IMPLEMENTATIONS:
        fused.get_base_model().set_experts_implementation(implementation)
        fused.zero_grad()
        loss = fused(**moe.batch(labels=True)).loss
        loss.backward()
        found.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for n in narrow_experts(fused) for p in n.parameters()]))
    for loss, gradient in zip(found[1:], gradients[1:], strict=True):
        assert relative(loss, found[0]) < 1e-5 and relative(gradient, gradients[0]) < 1e-5


@pytest.mark.parametrize("base_weights", ["offload", "discard"])
@pytest.mark.parametrize("moe", [QWEN2, GPT_OSS], ids=lambda a: a.name)
def test_originals_out_of_the_way(moe, base_weights, tmp_path):
    model = moe.make()
    original = logits(model, moe)
    plain = logits(get_peft_model(copy.deepcopy(model), half(moe)), moe)
    fused = get_peft_model(model, half(moe, base_weights=base_weights))
    assert torch.equal(logits(fused, moe), plain)
    layers = [m for m in fused.modules() if isinstance(m, ExpertsLayer)]
    assert all(p.numel() == 0 for layer in layers for p in layer.base_layer.parameters(recurse=False))
    assert [experts.width for experts in find_experts(fused)] == [moe.width] * len(layers)
    if base_weights == "discard":
        with pytest.raises(RuntimeError, match="were dropped"):
            fused.unload()
    else:
        with fused.disable_adapter():
            assert torch.equal(logits(fused, moe), original)
        second = half(moe, base_weights=base_weights)
        fused.add_adapter("second", second)
        fused.set_adapter("second")
        assert torch.equal(logits(fused, moe), plain)
    train(fused, moe)
    expected = logits(fused, moe)
    fused.save_pretrained(tmp_path)
    name = fused.active_adapter
    reloaded = PeftModel.from_pretrained(moe.make(), tmp_path / name if name != "default" else tmp_path)
    assert torch.equal(logits(reloaded, moe), expected)
    assert relative(logits(fused.merge_and_unload(), moe), expected) < 1e-5


def test_two_adapters_take_turns():
    fused = get_peft_model(MIXTRAL.make(), half(MIXTRAL))
    first = logits(fused, MIXTRAL)
    fused.add_adapter("other", FusionConfig(ratio=0.25, task_type="CAUSAL_LM"))
    assert torch.equal(logits(fused, MIXTRAL), first)
    fused.set_adapter("other")
    other = logits(fused, MIXTRAL)
    assert relative(other, first) > 1e-3
    fused.set_adapter("default")
    assert torch.equal(logits(fused, MIXTRAL), first)
    fused.delete_adapter("default")
    fused.set_adapter("other")
    assert torch.equal(logits(fused, MIXTRAL), other)


@pytest.mark.parametrize("moe", [MIXTRAL, DEEPSEEK, LLAMA4], ids=lambda a: a.name)
def test_lora_on_attention_beside(moe):
    model = moe.make()
    model.add_adapter(half(moe), "ffn")
    model.add_adapter(LoraConfig(target_modules=["o_proj"]), "attention")
    model.set_adapter(["ffn", "attention"])
    train(model, moe)
    trained = {name for name, p in model.named_parameters() if p.grad is not None or p.requires_grad}
    assert any("lora_" in name for name in trained) and any(".ffn." in name for name in trained)
    assert all("lora_" in name or "mlp_fusion_" in name for name in trained)


def test_modules_to_save_beside():
    fused = get_peft_model(MIXTRAL.make(), half(MIXTRAL, modules_to_save=["lm_head"]))
    before = fused.get_base_model().lm_head.modules_to_save.default.weight.clone()
    train(fused, MIXTRAL)
    assert not torch.equal(fused.get_base_model().lm_head.modules_to_save.default.weight, before)


@pytest.mark.parametrize(
    ("selection", "left"),
    [
        ({"target_modules": ["experts"]}, ["model.layers.1.mlp.experts"]),
        ({"target_modules": ["shared_expert"]}, ["model.layers.1.mlp.shared_expert"]),
        ({"target_modules": ["mlp"]}, ["model.layers.0.mlp"]),
        ({"exclude_modules": ["experts"]}, ["model.layers.0.mlp", "model.layers.1.mlp.shared_expert"]),
        (
            {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
            ["model.layers.0.mlp", "model.layers.1.mlp.shared_expert"],
        ),
        ({"layers_to_transform": [1]}, ["model.layers.1.mlp.experts", "model.layers.1.mlp.shared_expert"]),
    ],
)
def test_what_is_named(selection, left):
    fused = get_peft_model(QWEN2.make(), half(QWEN2, **selection))
    assert sorted(fused.peft_config["default"].fused_widths) == left
    before = {"intermediate_size": 64, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80}
    config = fused.merge_and_unload().config
    fused_now = {name: getattr(config, name) for name in before}
    named = {
        "mlp": "intermediate_size",
        "experts": "moe_intermediate_size",
        "shared_expert": "shared_expert_intermediate_size",
    }
    narrow = {named[name.rpartition(".")[2]] for name in left}
    assert fused_now == {name: width // 2 if name in narrow else width for name, width in before.items()}


def test_widths_that_grouped_products_cannot_take():
    with pytest.raises(ValueError, match="cannot be given 20 neurons: .* a multiple of 8"):
        get_peft_model(MIXTRAL.make(), FusionConfig(intermediate_size=20))
    fused = get_peft_model(MIXTRAL.make(), FusionConfig(ratio=0.3, multiple_of=3))
    assert {narrow.width for narrow in narrow_experts(fused)} == {24}
    fused = get_peft_model(DEEPSEEK.make(), FusionConfig(ratio=0.4))
    widths = fused.peft_config["default"].fused_widths
    assert widths["model.layers.1.mlp.experts"] == [48, 24]
    assert widths["model.layers.1.mlp.shared_experts"] == [96, 48]  # twice that of an expert, as the config has it


def test_fuse_leaves_plain_experts(unchanged):
    model = fuse(QWEN2.make(), half(QWEN2))
    assert not any(isinstance(m, FusionLayer) for m in model.modules())
    assert [ffn.width for ffn in find_all(model)] == [32, 24, 40]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    found = []
    for checkpointing in (False, True):
        fused = get_peft_model(GPT_OSS.make(), half(GPT_OSS))
        if checkpointing:
            fused.enable_input_require_grads()
            fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
        fused.train()
        fused(**GPT_OSS.batch(labels=True)).loss.backward()
        found.append(torch.cat([p.grad.flatten() for n in narrow_experts(fused) for p in n.parameters()]))
    assert relative(found[1], found[0]) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("moe", [MIXTRAL, GPT_OSS], ids=lambda a: a.name)
def test_half_precision_and_autocast(moe, implementation):
    full = get_peft_model(moe.make(), half(moe))
    expected = logits(full, moe)
    full.get_base_model().set_experts_implementation(implementation)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(logits(full, moe).float(), expected) < 0.05
        full(**moe.batch(labels=True)).loss.backward()
    fused = get_peft_model(moe.make().to(torch.bfloat16), half(moe))
    fused.get_base_model().set_experts_implementation(implementation)
    assert {p.dtype for narrow in narrow_experts(fused) for p in narrow.parameters()} == {torch.float32}
    assert logits(fused, moe).dtype == torch.bfloat16
    fused(**moe.batch(labels=True)).loss.backward()


def test_the_scale_acts_on_the_function_and_not_on_adam():
    """Each weight moves by about the learning rate, whatever its neuron's scale: it is not folded."""
    fused = get_peft_model(MIXTRAL.make(), half(MIXTRAL))
    (name, layer), *_ = [(n, m) for n, m in fused.named_modules() if isinstance(m, NarrowExperts)]
    before = {key: p.detach().clone() for key, p in layer.named_parameters()}
    optimizer = torch.optim.Adam([p for p in fused.parameters() if p.requires_grad], lr=1e-3, eps=0.0)
    fused(**MIXTRAL.batch(labels=True)).loss.backward()
    optimizer.step()
    for key, p in layer.named_parameters():
        moved = (p.detach() - before[key])[p.grad != 0].abs()
        assert torch.allclose(moved, torch.full_like(moved, 1e-3), rtol=1e-2)


def test_one_of_two_equal_clusters_weighs_as_many_neurons():
    """A narrow expert's out-weights get the gradient of all the neurons that they stand for."""
    model = MIXTRAL.make()
    for experts in find_experts(model):
        for weights in read_experts(experts):
            for block in weights.blocks():
                block[1::2] = block[::2]
    model.requires_grad_(True)
    model(**MIXTRAL.batch(labels=True)).loss.backward()
    wide = model.model.layers[1].mlp.experts.down_proj.grad
    fused = get_peft_model(model, half(MIXTRAL))
    fused(**MIXTRAL.batch(labels=True)).loss.backward()
    narrow = narrow_experts(fused)[1].down_proj
    together = wide.unflatten(2, (-1, 2)).sum(3)  # a neuron and its opposite, both ways round, are one
    torch.testing.assert_close(narrow.grad.abs(), together.abs(), rtol=1e-4, atol=1e-7)


def stored(moe, folder) -> dict[str, torch.Tensor]:
    get_peft_model(moe.make(), half(moe)).save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


EXPERTS = "base_model.model.model.layers.1.mlp.experts.mlp_fusion_narrow."
DAMAGES = {
    "lacks the tensor .*experts.mlp_fusion_narrow.down_proj": lambda t: t.pop(EXPERTS + "down_proj"),
    "of shape \\(4, 33, 24\\), but this model needs \\(4, 32, 24\\)": lambda t: t.update(
        {EXPERTS + "down_proj": torch.zeros(4, 33, 24)}
    ),
    "no place for": lambda t: t.update({EXPERTS + "down_proj_bias": torch.zeros(4, 32)}),
    "scale' of shape \\(3, 24\\), but this model": lambda t: t.update({EXPERTS + "scale": torch.zeros(3, 24)}),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_a_damaged_adapter_is_refused_before_anything_changes(problem, tmp_path, unchanged):
    tensors = stored(QWEN2, tmp_path)
    DAMAGES[problem](tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    model = QWEN2.make()
    check = unchanged(model)
    with pytest.raises(ValueError, match=problem):
        PeftModel.from_pretrained(model, tmp_path)
    check()
    with pytest.raises(ValueError, match=problem):
        model.load_adapter(str(tmp_path))
    check()


def test_an_adapter_of_another_model_is_refused(tmp_path, unchanged):
    stored(MIXTRAL, tmp_path)
    model = QWEN2.make()
    check = unchanged(model)
    with pytest.raises(ValueError, match="made for another model"):
        PeftModel.from_pretrained(model, tmp_path)
    check()


def test_a_scale_that_is_not_stored_is_none(tmp_path):
    fused = get_peft_model(MIXTRAL.make(), half(MIXTRAL, scale="none"))
    fused.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(MIXTRAL.make(), tmp_path)
    assert all(narrow.scale is None for narrow in narrow_experts(reloaded))
    assert torch.equal(logits(reloaded, MIXTRAL), logits(fused, MIXTRAL))


def test_an_interrupt_leaves_the_model_as_it_was(unchanged, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    for method in ("add_narrow", "merge"):
        model = QWEN2.make()
        fused = get_peft_model(model, half(QWEN2)) if method == "merge" else model
        check = unchanged(fused)
        with monkeypatch.context() as patched:
            patched.setattr(ExpertsLayer, method, interrupt)
            with pytest.raises(KeyboardInterrupt):
                fused.merge_and_unload() if method == "merge" else get_peft_model(model, half(QWEN2))
        check()


@pytest.mark.parametrize(
    ("moe", "method", "problem"),
    [
        (MIXTRAL, "svd", "lowers the ranks .* experts 'model.layers.0.mlp.experts'"),
        (GPT_OSS, "clustering", "linear in their second piece, which is not so in the experts"),
    ],
)
def test_methods_that_do_not_fit_are_refused(moe, method, problem, unchanged):
    model = moe.make()
    check = unchanged(model)
    with pytest.raises(ValueError, match=problem):
        get_peft_model(model, half(moe, method=method))
    check()


@pytest.mark.parametrize("method", ["clustering", "sketch", "mmd", "pruning"])
def test_every_other_method_fuses_experts(method):
    fused = get_peft_model(QWEN2.make(), half(QWEN2, method=method))
    assert {narrow.width for narrow in narrow_experts(fused)} == {24}
    assert torch.isfinite(logits(fused, QWEN2)).all()


def test_lora_on_fused_experts_is_refused():
    fused = get_peft_model(MIXTRAL.make(), half(MIXTRAL)).get_base_model()
    for target in ("down_proj", "experts.gate_up_proj"):
        with pytest.raises(ValueError, match="names projections of fused FFNs: model.layers.0.mlp.experts"):
            get_peft_model(fused, LoraConfig(target_modules=["q_proj"], target_parameters=[target]), "lora")


def test_dense_ffns_beside_experts_can_be_calibrated():
    model, config = QWEN2.make(), half(QWEN2, exclude_modules=["experts"])
    calibrate(model, config, [QWEN2.batch(size=8)])
    fused = get_peft_model(model, config)
    assert config.fused_by["calibration"] and not narrow_experts(fused)


def test_tuning_says_what_it_cannot_tune():
    fused = get_peft_model(MIXTRAL.make(), half(MIXTRAL))
    with pytest.raises(ValueError, match="narrows routed experts alone"):
        tune_layers(fused, [MIXTRAL.batch()])
