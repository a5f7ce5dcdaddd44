"""`calibrate`: what it collects, what it leaves alone, what it refuses."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME
from helpers import half, logits
from peft import get_peft_model
from torch import nn
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from peft_fusion import FusionConfig, fidelity
from peft_fusion.calibrate import OWN_SEQUENCES, SEQUENCES, calibrate
from peft_fusion.calibrate.tangents import FEWEST_SEQUENCES, MOST_SEQUENCES, sequences_for
from peft_fusion.ffn import find_activation, find_ffns, read_ffn
from peft_fusion.fidelity.ntk import tangent_kernels
from peft_fusion.fusing.gradient_kernels import TokenGradients, adam_kernels
from peft_fusion.fusing.statistics import SAMPLE_TOKENS, FFNStatistics
from peft_fusion.observe.batches import shortened
from peft_fusion.observe.gradients import MAGNIFIED
from peft_fusion.observe.networks import Network
from peft_fusion.observe.own_inputs import OWN_LENGTH, own_inputs
from peft_fusion.observe.projection import random_projection
from peft_fusion.tuner import build
from peft_fusion.tuner.calibration import calibration_for
from peft_fusion.tuner.plan import plan_ffns


def batches(architecture, count: int = 3, size: int = 4) -> list[dict[str, torch.Tensor]]:
    return [architecture.batch(labels=True, seed=seed, size=size) for seed in range(count)]


def found(model: nn.Module, config: FusionConfig) -> dict[str, FFNStatistics]:
    calibration = calibration_for(model, plan_ffns(model, config))
    assert calibration is not None
    return calibration.statistics


def naive(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What goes into every FFN's out-projection, one row a token, by plain hooks."""
    hidden: dict[str, torch.Tensor] = {}
    handles = []
    for ffn in find_ffns(model):

        def hook(module, args, name=ffn.name):
            hidden[name] = args[0].reshape(-1, args[0].shape[-1])

        handles.append(ffn.projections[-1].register_forward_pre_hook(hook))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return hidden


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_products_are_those_of_the_tokens_that_are_not_held_out(architecture, unchanged):
    model, config = architecture.make(), FusionConfig(ratio=0.5)
    check = unchanged(model)
    data = batches(architecture)
    calibrate(model, config, data)
    check(calibrated=True)
    statistics = found(model, config)
    assert len(statistics) == architecture.ffns
    expected = {name: torch.zeros(architecture.width, architecture.width) for name in statistics}
    for batch in data:
        for name, hidden in naive(model, batch).items():
            training = hidden.view(4, -1, architecture.width)[:3].flatten(0, 1)  # every fourth sequence is held out
            expected[name] += training.T @ training
    for name, statistic in statistics.items():
        torch.testing.assert_close(statistic.second_moment * statistic.tokens, expected[name], rtol=1e-4, atol=1e-4)
        assert (statistic.tokens, statistic.held_out_tokens) == (3 * 3 * 7, 3 * 7)
        assert statistic.held_out.shape == (21, 32)


@pytest.mark.parametrize("name", ["bert", "opt", "t5", "llama"])
def test_padding_is_left_out(name):
    architecture = BY_NAME[name]
    config = FusionConfig(ratio=0.5)
    short, padded = architecture.make(), architecture.make()
    batch = architecture.batch(size=4)
    calibrate(short, config, [batch])
    extra = torch.full((4, 5), 7)
    longer = {k: torch.cat([v, extra * (k != "attention_mask")], dim=1) for k, v in batch.items()}
    if "decoder_input_ids" in longer:
        longer["decoder_attention_mask"] = longer["attention_mask"]
    calibrate(padded, config, [longer])
    for ffn, statistic in found(short, config).items():
        other = found(padded, config)[ffn]
        assert (other.tokens, other.held_out_tokens) == (statistic.tokens, statistic.held_out_tokens)
        torch.testing.assert_close(other.covariance, statistic.covariance, rtol=1e-3, atol=1e-3)


def test_several_passes_give_the_same():
    bert, config = BY_NAME["bert"], FusionConfig(ratio=0.5)
    once, often = bert.make(), bert.make()
    calibrate(once, config, batches(bert))
    calibrate(often, config, batches(bert), ffns_per_pass=2)
    for name, statistic in found(once, config).items():
        assert torch.equal(found(often, config)[name].product, statistic.product)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_a_model_can_make_its_own_inputs(architecture, unchanged):
    model, config = architecture.make(), FusionConfig(ratio=0.5)
    check, state = unchanged(model), torch.get_rng_state()
    calibrate(model, config, sequences=8, length=8)
    check(calibrated=True)
    assert torch.equal(torch.get_rng_state(), state)
    again = architecture.make()
    calibrate(again, config, sequences=8, length=8)
    for name, statistic in found(model, config).items():
        assert statistic.tokens > 0 and torch.equal(found(again, config)[name].product, statistic.product)


@pytest.mark.parametrize(("data", "sequences"), [(True, SEQUENCES), (False, OWN_SEQUENCES)])
def test_how_much_it_takes_unless_told(data, sequences):
    llama, config = BY_NAME["llama"], FusionConfig(ratio=0.5)
    model = llama.make()
    model.config.max_position_embeddings = 1000  # the length is the default, not the longest
    calibrate(model, config, batches(llama, count=80) if data else None)
    length = llama.batch()["input_ids"].shape[1] if data else OWN_LENGTH
    tokens = sequences * length
    used = tokens - tokens // 4 + min(tokens // 4, SAMPLE_TOKENS)
    source = calibration_for(model, plan_ffns(model, config)).source
    assert source.startswith(f"{sequences} sequences, {used} tokens of ")


def test_scales_are_fitted_to_sentences_that_the_refit_does_not_see(monkeypatch):
    seen = []
    module = importlib.import_module("peft_fusion.calibrate")  # the package shows the function by that name
    monkeypatch.setattr(module, "add_tangents", lambda model, planned, sentences, *_: seen.extend(sentences))
    bert = BY_NAME["bert"]
    data = batches(bert, count=5)
    calibrate(bert.make(), FusionConfig(ratio=0.5), data)
    assert len(seen) == 5 and all(
        torch.equal(s["input_ids"], b["input_ids"][3:]) for s, b in zip(seen, data, strict=True)
    )


def test_only_as_many_sequences_as_asked_for():
    bert, config = BY_NAME["bert"], FusionConfig(ratio=0.5)
    model = bert.make()
    calibrate(model, config, batches(bert, count=50), sequences=8)
    assert next(iter(found(model, config).values())).tokens == 6 * 7


def test_the_held_out_sample_is_bounded():
    statistics = FFNStatistics(4, 3)
    for _ in range(3):
        statistics.hold_out(torch.randn(SAMPLE_TOKENS // 2, 3))
    assert statistics.held_out.shape == (SAMPLE_TOKENS, 3)


def test_a_fused_model_is_calibrated_on_its_original(unchanged):
    bert, config = BY_NAME["bert"], FusionConfig(ratio=0.5)
    plain = bert.make()
    calibrate(plain, config, batches(bert))
    fused = get_peft_model(bert.make(), FusionConfig(ratio=0.5))
    trainable = {name: p.requires_grad for name, p in fused.named_parameters()}
    calibrate(fused, config, batches(bert))
    assert {name: p.requires_grad for name, p in fused.named_parameters()} == trainable
    for name, statistic in found(fused.get_base_model(), config).items():
        torch.testing.assert_close(statistic.covariance, found(plain, config)[name].covariance)


class Unusable:
    """Batches that cannot be used, and what is said of them."""

    cases = {
        "none": ([], "at least 4 sequences, .* but got 0"),
        "too few": ([BY_NAME["bert"].batch(size=2)], "but got 2"),
        "a tuple": ([(torch.ones(4, 7),)], "must be a mapping of tensors, .* but got tuple"),
        "strings": ([{"text": ["a"] * 4}], "must be a mapping of tensors.*'text': 'list'"),
        "wrong names": ([{"pixels": torch.ones(4, 7)}], r"cannot take a calibration batch with \['pixels'\]"),
        "unknown tokens": ([{"input_ids": torch.full((4, 7), 1000)}], "cannot take a calibration batch"),
        "all padding": ([{**BY_NAME["bert"].batch(size=4), "attention_mask": torch.zeros(4, 7)}], "No token went"),
    }


@pytest.mark.parametrize("case", Unusable.cases)
def test_unusable_batches(case, unchanged):
    data, message = Unusable.cases[case]
    model = BY_NAME["bert"].make()
    check = unchanged(model)
    with pytest.raises(ValueError, match=message):
        calibrate(model, FusionConfig(), data)
    check()
    assert calibration_for(model, plan_ffns(model, FusionConfig())) is None


def test_activations_that_are_not_finite(unchanged):
    bert = BY_NAME["bert"]
    model = bert.make()
    model.bert.embeddings.LayerNorm.weight.data[:] = torch.nan
    check = unchanged(model)
    with pytest.raises(ValueError, match=r"At the FFN 'bert.encoder.layer.0' the .* NaN .*sequences 0 to 3"):
        calibrate(model, FusionConfig(), batches(bert))
    check()


def test_statistics_for_another_configuration_or_other_weights():
    bert = BY_NAME["bert"]
    model = bert.make()
    calibrate(model, FusionConfig(layers_to_transform=[0]), batches(bert))
    with pytest.raises(ValueError, match="was calibrated for the FFNs .*layer.0.*layer.1.* are to be fused"):
        get_peft_model(model, FusionConfig())
    model.bert.encoder.layer[0].output.dense.weight.data *= 2
    with pytest.raises(ValueError, match="have changed since the model was calibrated"):
        get_peft_model(model, FusionConfig(layers_to_transform=[0]))


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_own_inputs_hold_no_token_that_the_embedding_lacks(architecture):
    model = BY_NAME[architecture].make()
    model.config.vocab_size *= 100
    known = model.get_input_embeddings().num_embeddings
    made = torch.cat([batch["input_ids"] for batch in own_inputs(model, 32, 8, seed=0)])
    assert made.max() < known


def test_own_inputs_where_transformers_finds_no_embedding(monkeypatch):
    model = BY_NAME["bert"].make()

    def not_handled():
        raise NotImplementedError

    monkeypatch.setattr(model, "get_input_embeddings", not_handled)
    assert own_inputs(model, 4, 8, seed=0)[0]["input_ids"].max() < model.config.vocab_size


def test_a_model_of_sounds_makes_no_inputs_of_its_own(unchanged):
    convolutions = {"conv_dim": (16,), "conv_stride": (4,), "conv_kernel": (4,), "num_feat_extract_layers": 1}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 4}
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**convolutions, **sizes, **positions))
    check = unchanged(model)
    with pytest.raises(ValueError, match="takes `input_values` and not `input_ids`.*Pass a `dataloader`"):
        calibrate(model, FusionConfig())
    check()


def test_too_few_own_sequences_are_not_blamed_on_a_data_loader():
    with pytest.raises(ValueError, match="at least 4 sequences, .* but got 2") as refusal:
        calibrate(BY_NAME["bert"].make(), FusionConfig(), sequences=2)
    assert "data loader" not in str(refusal.value)


@pytest.mark.parametrize(("name", "value"), [("sequences", 0), ("length", -1), ("ffns_per_pass", 1.5)])
def test_numbers_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1"):
        calibrate(BY_NAME["bert"].make(), FusionConfig(), [], **{name: value})


def test_a_model_without_a_vocabulary_needs_data():
    model = nn.Module()
    model.fc1, model.fc2 = nn.Linear(8, 32), nn.Linear(32, 8)
    with pytest.raises(ValueError, match="no `config.vocab_size`.*Pass a `dataloader`"):
        calibrate(model, FusionConfig())


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
@pytest.mark.filterwarnings("error:No gradients")
def test_the_original_kernels_are_those_of_fidelity(architecture):
    model, config = architecture.make(), FusionConfig(ratio=0.5)
    data = batches(architecture)
    calibrate(model, config, data)
    side = Network(model, find_ffns(model), fused=False)
    sentences = [{k: v[3:4] for k, v in batch.items() if k != "labels" or side.is_encoder_decoder} for batch in data]
    expected = tangent_kernels(side, sentences, random_projection(side, config.seed + 1), 2**28)
    for ffn in side.ffns:
        tangents = found(model, config)[ffn.name].tangents
        assert tangents is not None and len(tangents.tokens.counts) == 3
        *ins, out = tangents.kernels
        total = sum(expected[ffn.name, path].adam for path in ffn.layout.in_projections)
        torch.testing.assert_close(sum(ins).double() / MAGNIFIED, total, rtol=1e-3, atol=1e-6)
        if read_ffn(ffn).out_bias is None:  # which no scale multiplies
            theirs = expected[ffn.name, ffn.layout.out_projection].adam
            torch.testing.assert_close(out.double() / MAGNIFIED, theirs, rtol=1e-3, atol=1e-6)


def test_gradients_are_those_of_a_model_that_is_narrow():
    llama, config = BY_NAME["llama"], FusionConfig(ratio=0.5)
    model, full = llama.make(), FusionConfig(ratio=1.0)
    calibrate(model, full, batches(llama))
    for ffn in find_ffns(model):  # where nothing is narrowed, the stand-ins are the originals
        tangents = found(model, full)[ffn.name].tangents
        same = adam_kernels(read_ffn(ffn), find_activation(ffn), tangents.tokens)
        for kernel, expected in zip(same, tangents.kernels, strict=True):
            torch.testing.assert_close(kernel, expected)
    wide: dict[str, TokenGradients] = {name: s.tangents.tokens for name, s in found(model, full).items()}
    calibrate(model, config, batches(llama))
    first, second, *_ = (found(model, config)[name].tangents.tokens for name in wide)
    before = list(wide.values())
    assert torch.equal(first.inputs, before[0].inputs) and not torch.equal(first.gradients, before[0].gradients)
    assert not torch.equal(second.inputs, before[1].inputs)


def test_gradients_lower_the_kernel_error_on_other_sentences():
    bert, config = BY_NAME["bert"], FusionConfig(ratio=0.25)
    errors = [0.0, 0.0]
    for first in (0, 200, 400):  # on random weights one calibration tells little
        for index, use in enumerate((True, False)):
            model = bert.make()
            calibrate(model, config, [bert.batch(labels=True, seed=first + i, size=4) for i in range(100)])
            for statistic in found(model, config).values():
                statistic.tangents = statistic.tangents if use else None
            fused = get_peft_model(model, config)
            held_out = [bert.batch(seed=1000 + i, size=4) for i in range(8)]
            errors[index] += fidelity(fused, held_out).ntk.adam.relative
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("training", [True, False])
def test_a_model_without_gradients_is_fused_without_them(training, unchanged):
    bert, config = BY_NAME["bert"], FusionConfig(ratio=0.5)
    model = bert.make().train(training)
    forward = model.classifier.forward
    model.classifier.forward = torch.no_grad()(forward)
    check = unchanged(model)
    with pytest.warns(UserWarning, match="No gradients could be taken through .*estimated without them: RuntimeError"):
        calibrate(model, config, batches(bert))
    check(calibrated=True)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(statistic.tangents is None for statistic in found(model, config).values())
    get_peft_model(model, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("error:No gradients")
def test_gradients_of_a_model_in_half_precision_leave_no_trace(dtype, unchanged):
    bert, config = BY_NAME["bert"], FusionConfig(ratio=0.5)
    model = bert.make().to(dtype).train()
    model.bert.embeddings.requires_grad_(False)
    check = unchanged(model)
    calibrate(model, config, batches(bert))
    check(calibrated=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    for statistic in found(model, config).values():
        assert statistic.tangents.tokens.gradients.dtype == dtype
        assert all(bool(kernel.isfinite().all()) and bool(kernel.any()) for kernel in statistic.tangents.kernels)


def test_the_sentences_with_gradients_are_bounded(monkeypatch):
    bert, config = BY_NAME["bert"], FusionConfig(ratio=0.5)
    model = bert.make()
    calibrate(model, config, batches(bert, count=40, size=3))
    counts = next(iter(found(model, config).values())).tangents.tokens.counts
    assert len(counts) == FEWEST_SEQUENCES == sequences_for(120) and sequences_for(10**6) == MOST_SEQUENCES
    monkeypatch.setattr(importlib.import_module("peft_fusion.calibrate.tangents"), "MOST_TOKENS", 7)
    calibrate(model, config, batches(bert, count=40, size=3))
    assert len(next(iter(found(model, config).values())).tangents.tokens.counts) == 2
    calibrate(model, config, batches(bert, count=1))
    assert next(iter(found(model, config).values())).tangents is None  # one sentence has no kernel


def test_gradients_are_of_the_first_tokens_that_are_not_padding(monkeypatch):
    monkeypatch.setattr("peft_fusion.observe.batches.MOST_LENGTH", 3)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    sentence = {"input_ids": torch.arange(7)[None], "attention_mask": mask, "labels": torch.ones(1)}
    short = shortened(sentence)
    assert short["input_ids"].tolist() == [[2, 3, 4]] and short["attention_mask"].tolist() == [[1, 1, 1]]
    assert short["labels"].shape == (1,)
    image = {"pixel_values": torch.ones(1, 3, 8, 8)}
    assert shortened(image) == image


def test_an_unfinished_fusion_uses_the_calibration_up(monkeypatch):
    """Each FFN's statistics are freed once it is fused; what is left of them must not be taken for a calibration."""
    llama = BY_NAME["llama"]
    model, config = llama.make(), half(llama)
    calibrate(model, config, batches(llama))
    reference = get_peft_model(copy.deepcopy(model), config)
    made = build._projections

    def interrupted(narrow, planned, recipe):
        if planned.ffn.name.endswith("1.mlp"):
            raise KeyboardInterrupt
        return made(narrow, planned, recipe)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build, "_projections", interrupted)
        get_peft_model(model, config)
    with pytest.raises(ValueError, match="Call `calibrate` again"):
        get_peft_model(model, config)
    calibrate(model, config, batches(llama))
    assert torch.equal(logits(get_peft_model(model, config), llama), logits(reference, llama))
