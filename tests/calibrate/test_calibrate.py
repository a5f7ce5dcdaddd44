"""`calibrate`: what it hands over, what it leaves alone, what it refuses, and what an interrupt costs."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from accelerate import Accelerator
from architectures import ARCHITECTURES, BY_NAME
from helpers import half, logits
from peft import LoraConfig, get_peft_model
from test_collect import batches
from torch import nn
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from peft_fusion import FusionConfig, calibrate, fidelity
from peft_fusion.tuner.handover import Calibrated, handed_over

BERT, LLAMA = BY_NAME["bert"], BY_NAME["llama"]
module = importlib.import_module("peft_fusion.calibrate")  # the package shows the function by that name


def made(model: nn.Module) -> Calibrated:
    calibrated = handed_over(model)
    assert calibrated is not None
    return calibrated


def same(first: Calibrated, second: Calibrated) -> bool:
    """Whether two calibrations made the same narrow FFNs, bit for bit."""
    assert first.narrow.keys() == second.narrow.keys()
    pairs = [(first.narrow[name], second.narrow[name]) for name in first.narrow]
    return all(
        all(torch.equal(a, b) for a, b in zip(one.weights.blocks(), other.weights.blocks(), strict=True))
        and torch.equal(one.scale, other.scale)
        and all(torch.equal(a, b) for a, b in zip(one.in_scales or (), other.in_scales or (), strict=True))
        for one, other in pairs
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
@pytest.mark.filterwarnings("error:No gradients")
def test_nothing_of_the_model_changes(architecture, unchanged):
    model, config = architecture.make().train(), FusionConfig(ratio=0.5)
    check, state = unchanged(model), torch.get_rng_state()
    calibrate(model, config, batches(architecture))
    check(calibrated=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert len(made(model).narrow) == architecture.ffns
    for narrow in made(model).narrow.values():
        assert narrow.weights.width == architecture.width // 2
    assert made(model).recipe.kernel == "fisher" and made(model).recipe.scale == "ntk"


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_what_it_made_is_installed_and_let_go(architecture):
    model, config = architecture.make(), half(architecture)
    calibrate(model, config, batches(architecture))
    narrow = made(model).narrow
    fused = get_peft_model(model, config)
    assert handed_over(model) is None
    assert config.fused_by["calibration"].startswith("12 sequences of data")
    weights = [m.weight for n, m in fused.named_modules() if n.endswith("mlp_fusion_narrow.default")]
    first = next(iter(narrow.values())).weights.in_weights[0]
    assert any(torch.equal(weight[: len(first)], first) for weight in weights)


@pytest.mark.parametrize("architecture", ["bert", "llama", "t5_gated"])
@pytest.mark.parametrize("group", [1, 2])
def test_groups_of_ffns_give_the_same(architecture, group):
    once, often = (BY_NAME[architecture].make() for _ in range(2))
    calibrate(once, FusionConfig(ratio=0.5), batches(BY_NAME[architecture]))
    calibrate(often, FusionConfig(ratio=0.5), batches(BY_NAME[architecture]), ffns_per_pass=group)
    assert same(made(once), made(often))


def test_a_group_bounds_what_is_held(monkeypatch):
    """Statistics of one group at a time, the metric's matrices included; then none."""
    alive: set[int] = set()
    most = []
    narrowing = importlib.import_module("peft_fusion.calibrate.narrowing")
    collect = narrowing.collect

    def counted(network, inputs):
        found = collect(network, inputs)
        for statistics in found.values():
            alive.add(id(statistics))
            weakref_finalize(statistics, alive.discard, id(statistics))
        most.append(len(alive))
        return found

    from weakref import finalize as weakref_finalize

    monkeypatch.setattr(narrowing, "collect", counted)
    calibrate(LLAMA.make(), FusionConfig(ratio=0.5), batches(LLAMA), ffns_per_pass=1)
    assert most == [1, 1, 1] and not alive


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_without_data(architecture, unchanged):
    model, config = architecture.make(), FusionConfig(ratio=0.5)
    check, state = unchanged(model), torch.get_rng_state()
    calibrate(model, config, sequences=8, length=8)
    check(calibrated=True)
    assert torch.equal(torch.get_rng_state(), state)
    again = architecture.make()
    calibrate(again, config, sequences=8, length=8)
    assert same(made(model), made(again))


def test_what_it_made_is_installed_without_a_copy_and_the_originals_are_not():
    model = LLAMA.make()
    config = half(LLAMA, width_pattern={r"layers\.1\.mlp": 64})  # one FFN stays whole
    calibrate(model, config, batches(LLAMA))
    narrow = made(model).narrow
    pointers = {name: [w.data_ptr() for w in found.weights.in_weights] for name, found in narrow.items()}
    originals = {w.data_ptr() for w in model.parameters()}
    fused = get_peft_model(model, config)
    installed = {n: p.data_ptr() for n, p in fused.named_parameters() if p.requires_grad and n.endswith("weight")}
    assert len(installed) == 9 and not originals & set(installed.values())
    for name in (name for name in narrow if ".1." not in name):
        for projection, pointer in zip(("gate_proj", "up_proj"), pointers[name], strict=True):
            assert any(f"{name}.{projection}." in n and found == pointer for n, found in installed.items())


def test_ffns_that_stay_whole_are_left_as_they_are():
    model = LLAMA.make()
    original = logits(model, LLAMA)
    config = half(LLAMA, width_pattern={r"layers\.[02]\.mlp": 1.0})
    calibrate(model, config, batches(LLAMA))
    assert [n.weights.width for n in made(model).narrow.values()] == [64, 32, 64]
    whole = LLAMA.make()
    calibrate(whole, half(LLAMA, width_pattern={"mlp": 1.0}), batches(LLAMA))
    fused = get_peft_model(whole, half(LLAMA, width_pattern={"mlp": 1.0}))
    assert torch.allclose(logits(fused, LLAMA), original, atol=1e-5)
    get_peft_model(model, config)


def plain() -> Calibrated:
    model = BERT.make()
    calibrate(model, FusionConfig(ratio=0.5), batches(BERT))
    return made(model)


@pytest.mark.parametrize("around", ["adapter", "merged", "mixed", "native", "accelerate", "compiled"])
def test_whatever_is_around_a_model_its_original_is_calibrated(around):
    host = BERT.make()
    model: nn.Module = host
    if around in ("adapter", "merged", "accelerate", "compiled"):
        model = get_peft_model(host, FusionConfig(ratio=0.25))
    if around == "merged":
        model.merge_adapter()
    if around == "mixed":
        model = get_peft_model(host, LoraConfig(target_modules=["query"]), mixed=True)
    if around == "native":
        host.add_adapter(FusionConfig(ratio=0.25), "first")
    if around == "accelerate":
        model = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    if around == "compiled":
        model = torch.compile(model, backend="eager")
    before, merged = logits(host, BERT), _merged(host)
    trainable = {name: p.requires_grad for name, p in host.named_parameters()}
    calibrate(model, FusionConfig(ratio=0.5), batches(BERT))
    assert torch.equal(logits(host, BERT), before) and _merged(host) == merged
    assert {name: p.requires_grad for name, p in host.named_parameters()} == trainable
    assert same(made(host), plain())


def _merged(model: nn.Module) -> list[bool]:
    return [m.merged for m in model.modules() if hasattr(m, "merged_adapters")]


def test_a_mixed_model_gets_what_was_made_for_it():
    reference = BERT.make()
    calibrate(reference, FusionConfig(ratio=0.5), batches(BERT))
    expected = logits(get_peft_model(reference, FusionConfig(ratio=0.5)), BERT)
    model = get_peft_model(BERT.make(), LoraConfig(target_modules=["query"]), "lora", mixed=True)
    calibrate(model, FusionConfig(ratio=0.5), batches(BERT))
    model.add_adapter("ffn", FusionConfig(ratio=0.5))
    model.set_adapter(["lora", "ffn"])
    assert torch.equal(logits(model, BERT), expected)  # a fresh LoRA adapter adds nothing


def test_a_refused_calibration_leaves_a_merged_adapter_merged(unchanged):
    model = get_peft_model(BERT.make(), FusionConfig(ratio=0.25))
    model.merge_adapter()
    for wrong in ([], [(torch.ones(4, 7),)], [{"pixels": torch.ones(4, 7)}]):
        with pytest.raises(ValueError, match="at least 4 sequences|mapping of argument names|cannot take a batch"):
            calibrate(model, FusionConfig(), wrong)
    assert all(_merged(model))


class Unusable:
    """Batches that cannot be used, and what is said of them."""

    cases = {
        "none": ([], "at least 4 sequences, .* but got 0"),
        "too few": ([BERT.batch(size=2)], "but got 2"),
        "a tuple": ([(torch.ones(4, 7),)], "must be a mapping of argument names to tensors, .* but got tuple"),
        "strings": ([{"text": ["a"] * 4}], "must be a mapping .*'text': 'list'"),
        "a number": ([{"input_ids": torch.tensor(3)}], r"'input_ids': 'a tensor of shape \(\)'"),
        "wrong names": ([{"pixels": torch.ones(4, 7)}], r"cannot take a batch with \['pixels'\]"),
        "unknown tokens": ([{"input_ids": torch.full((4, 7), 1000)}], "cannot take a batch"),
        "all padding": ([{**BERT.batch(size=4), "attention_mask": torch.zeros(4, 7)}], "No token went"),
    }


@pytest.mark.parametrize("case", Unusable.cases)
def test_unusable_batches(case, unchanged):
    data, message = Unusable.cases[case]
    model = BERT.make()
    check = unchanged(model)
    with pytest.raises(ValueError, match=message):
        calibrate(model, FusionConfig(kernel="outputs"), data)
    check()
    assert handed_over(model) is None


def test_a_model_of_sounds_makes_no_inputs_of_its_own(unchanged):
    convolutions = {"conv_dim": (16,), "conv_stride": (4,), "conv_kernel": (4,), "num_feat_extract_layers": 1}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 4}
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**convolutions, **sizes, **positions))
    check = unchanged(model)
    with pytest.raises(ValueError, match="takes `input_values` and not `input_ids`.*Pass a `dataloader`"):
        calibrate(model, FusionConfig())
    check()


@pytest.mark.parametrize(
    ("name", "value"), [("sequences", 0), ("length", -1), ("ffns_per_pass", 1.5), ("sequences", True)]
)
def test_numbers_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1"):
        calibrate(BERT.make(), FusionConfig(), [], **{name: value})


def test_batches_in_the_place_of_the_configuration():
    with pytest.raises(TypeError, match="`config` must be a `FusionConfig`, but got list. Batches go in `dataloader="):
        calibrate(BERT.make(), batches(BERT))


@pytest.mark.parametrize("method", ["svd", "sketch", "mmd", "clustering"])
def test_methods_that_use_no_data(method, unchanged):
    model = BERT.make()
    check = unchanged(model)
    with pytest.raises(ValueError, match=f'`method="{method}"` .* cannot be calibrated'):
        calibrate(model, FusionConfig(method=method), batches(BERT))
    check()


def calibrated_for(**settings) -> nn.Module:
    model = BERT.make()
    calibrate(model, FusionConfig(**{"ratio": 0.5, **settings}), batches(BERT))
    return model


@pytest.mark.parametrize(
    ("made_with", "asked", "message"),
    [
        ({"layers_to_transform": [0]}, {}, "was calibrated for the FFNs .*layer.0.*layer.1.* are to be fused as well"),
        ({}, {"ratio": 0.25}, "32 neurons wide, but the configuration asks for 16"),
        ({}, {"kernel": "outputs"}, "calibrated with {'kernel': 'fisher'}, but .* asks for {'kernel': 'outputs'}"),
        ({}, {"method": "pruning"}, "calibrated with {'method': 'fusion'}"),
        ({}, {"refit": "none"}, "calibrated with {'refit': 'ridge'}"),
        ({}, {"seed": 3}, "calibrated with {'seed': 0}"),
    ],
)
def test_a_configuration_that_asks_for_something_else(made_with, asked, message, unchanged):
    model = calibrated_for(**made_with)
    check = unchanged(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, FusionConfig(**{"ratio": 0.5, **asked}))
    check()
    assert handed_over(model) is not None


def test_a_configuration_that_spells_out_what_auto_came_to():
    expected = logits(get_peft_model(calibrated_for(), FusionConfig(ratio=0.5)), BERT)
    spelled_out = FusionConfig(ratio=0.5, kernel="fisher", representative="neuron", refit="ridge", scale="ntk")
    assert torch.equal(logits(get_peft_model(calibrated_for(), spelled_out), BERT), expected)


def test_a_method_that_uses_no_calibration_says_so():
    with pytest.warns(UserWarning, match='`method="sketch"` makes no use of the calibration'):
        get_peft_model(calibrated_for(), FusionConfig(ratio=0.5, method="sketch"))


def test_weights_that_have_changed_since():
    model = calibrated_for()
    weight = model.bert.encoder.layer[1].output.dense.weight.data
    weight[3, 5] += 0.1
    with pytest.raises(ValueError, match="FFN 'bert.encoder.layer.1' have changed since the model was calibrated"):
        get_peft_model(model, FusionConfig(ratio=0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_that_moved_to_another_precision(dtype):
    get_peft_model(calibrated_for().to(dtype), FusionConfig(ratio=0.5))
    changed = calibrated_for().to(dtype)
    changed.bert.encoder.layer[0].output.dense.weight.data *= 1.1
    with pytest.raises(ValueError, match="have changed"):
        get_peft_model(changed, FusionConfig(ratio=0.5))


@pytest.mark.parametrize("training", [True, False])
def test_a_model_without_gradients_is_fused_without_them(training, unchanged):
    model = BERT.make().train(training)
    model.bert.encoder.forward = torch.no_grad()(model.bert.encoder.forward)
    check = unchanged(model)
    with pytest.warns(UserWarning, match="No gradients could be taken through Bert") as warned:
        calibrate(model, FusionConfig(ratio=0.5), batches(BERT))
    check(calibrated=True)
    told = " ".join(str(w.message) for w in warned)
    assert "errors of its FFNs' outputs all count alike" in told and "are estimated without them" in told
    assert made(model).recipe.kernel == "outputs"
    with pytest.raises(ValueError, match=r'`kernel="fisher"` needs gradients'):
        calibrate(model, FusionConfig(ratio=0.5, kernel="fisher"), batches(BERT))
    check(calibrated=True)
    config = FusionConfig(ratio=0.5)
    get_peft_model(model, config)
    assert config.fused_by["kernel"] == "outputs"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
@pytest.mark.parametrize("where", ["observe.fisher", "calibrate.scales"])
def test_memory_that_runs_out_is_reported_as_that(error, where, monkeypatch, unchanged):
    """Never a warning and another kernel."""
    model = BERT.make()
    check = unchanged(model)
    room = importlib.import_module(f"peft_fusion.{where}")

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(room, "gradients_of_sequence", full)
    with pytest.raises(type(error)):
        calibrate(model, FusionConfig(ratio=0.5), batches(BERT))
    monkeypatch.undo()
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", full)
    with pytest.raises(type(error)):
        calibrate(model, FusionConfig(ratio=0.5), batches(BERT))
    monkeypatch.setattr(torch.autograd, "grad", real)
    check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("error:No gradients")
def test_a_model_in_half_precision(dtype, unchanged):
    model, config = BERT.make().to(dtype).train(), FusionConfig(ratio=0.5)
    model.bert.embeddings.requires_grad_(False)
    check = unchanged(model)
    calibrate(model, config, batches(BERT))
    check(calibrated=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    fused = get_peft_model(model, config)
    assert fidelity(fused, batches(BERT)).ntk.adam.relative < 1


@pytest.mark.parametrize("moment", range(0, 60, 7))
def test_an_interrupt_at_any_moment_leaves_the_model_and_an_earlier_calibration(moment, monkeypatch, unchanged):
    model, config = LLAMA.make(), half(LLAMA)
    calibrate(model, config, batches(LLAMA))
    earlier, check = made(model), unchanged(model)
    before = copy.deepcopy(earlier)
    calls = iter(range(10**9))
    forward = nn.Linear.forward

    def interrupted(self, x):
        if next(calls) == 10 * moment:
            raise KeyboardInterrupt
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, config, batches(LLAMA, count=4))
    monkeypatch.undo()
    check()
    assert made(model) is earlier and same(earlier, before)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    get_peft_model(model, config)
