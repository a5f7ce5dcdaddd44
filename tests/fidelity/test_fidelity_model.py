"""`fidelity` leaves the model as it was, refuses what it cannot do, and its report can be read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from architectures import BY_NAME
from peft import get_peft_model
from torch import nn

from peft_fusion import FusionConfig, fuse
from peft_fusion.fidelity import KernelError, OutputError, fidelity
from peft_fusion.observe.networks import fusion_layers

BERT = BY_NAME["bert"]


def fused_model(**config) -> nn.Module:
    return get_peft_model(BERT.make(), FusionConfig(**{"task_type": "SEQ_CLS", **config}))


@pytest.fixture(scope="module")
def report():
    return fidelity(fused_model(), [BERT.batch()])


def breaks_on(call: int):
    """A function for the kernels that fails at one of its calls."""
    calls = []

    def function(output, sentence):
        calls.append(sentence)
        if len(calls) == call:
            raise RuntimeError("broken on purpose")
        return output.logits.sum()

    return function


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("failing", [None, 1, 3, 6])
def test_the_model_is_as_it_was_also_after_an_error(disabled, failing, unchanged):
    model = fused_model().train()
    model.base_model.model.bert.encoder.layer[1].eval()
    next(model.parameters()).requires_grad_(True)
    model(**BERT.batch(labels=True)).loss.backward()
    if disabled:
        model.base_model.disable_adapter_layers()
    check = unchanged(model)
    if failing is None:
        fidelity(model, [BERT.batch()])
    else:
        with pytest.raises(RuntimeError, match="broken on purpose"):
            fidelity(model, [BERT.batch()], function=breaks_on(failing))
    check()


def test_the_model_is_as_it_was_after_a_batch_it_does_not_take(unchanged):
    model = fused_model().train()
    check = unchanged(model)
    with pytest.raises(ValueError, match="Bert.* cannot take a batch with .'wrong'.: .*input_ids"):
        fidelity(model, [BERT.batch(), {"wrong": torch.ones(2, 3)}])
    check()


def test_a_second_adapter_is_left_alone(unchanged):
    model = fused_model(ratio=0.25)
    model.add_adapter("wider", FusionConfig(ratio=0.5, task_type="SEQ_CLS"))
    model.set_adapter("wider")
    check = unchanged(model)
    assert {ffn.narrow_width for ffn in fidelity(model, [BERT.batch()]).ffns} == {32}
    check()
    model.set_adapter("default")
    assert {ffn.narrow_width for ffn in fidelity(model, [BERT.batch()]).ffns} == {16}


def test_a_reference_is_left_alone(unchanged):
    reference = BERT.make().train()
    narrow = fuse(BERT.make(), FusionConfig())
    check = unchanged(reference)
    fidelity(narrow, [BERT.batch()], reference=reference)
    check()


@pytest.mark.parametrize("base_weights", ["offload", "discard"])
def test_originals_that_are_set_aside(base_weights, report):
    model = fused_model(base_weights=base_weights)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    if base_weights == "discard":
        with pytest.raises(RuntimeError, match="were dropped"):
            fidelity(model, [BERT.batch()])
    found = fidelity(model, [BERT.batch()], reference=None if base_weights == "offload" else BERT.make())
    assert found.ntk == report.ntk and found.parameters == report.parameters and found.ffns == report.ffns
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert all(layer.original_layer.weight.numel() == 0 for layer in fusion_layers(model))


def test_labels_are_not_needed_and_not_used(report):
    batch = {**BERT.batch(), "labels": torch.full((3,), 99)}  # no such class: a loss would raise
    assert fidelity(fused_model(), [batch]).ntk == report.ntk


def test_an_encoder_decoder_makes_its_inputs_from_labels():
    model = get_peft_model(BY_NAME["t5"].make(), FusionConfig())
    assert fidelity(model, [BY_NAME["t5"].batch(labels=True)]).outputs.relative > 0.01


@pytest.mark.parametrize("data", [[], iter([])])
def test_refuses_a_dataloader_that_yields_nothing(data):
    with pytest.raises(ValueError, match="yields no batch"):
        fidelity(fused_model(), data)


@pytest.mark.parametrize("batch", [torch.ones(2, 3), (torch.ones(2),), {"text": ["a", "b"]}])
def test_refuses_batches_that_are_not_mappings_of_tensors(batch):
    with pytest.raises(ValueError, match="mapping of argument names to tensors, .* but got "):
        fidelity(fused_model(), [batch])


def test_refuses_a_model_without_adapter_and_without_reference():
    with pytest.raises(ValueError, match="no active fusion adapter.*`reference`"):
        fidelity(BERT.make(), [BERT.batch()])


def test_refuses_a_reference_that_is_another_model():
    with pytest.raises(ValueError, match="LlamaForCausalLM.*has no FFN named bert.encoder.layer.0"):
        fidelity(fused_model(), [BERT.batch()], reference=BY_NAME["llama"].make())


def test_refuses_a_merged_adapter(unchanged):
    model = fused_model()
    model.merge_adapter()
    check = unchanged(model)
    with pytest.raises(ValueError, match="merged.*unmerge_adapter"):
        fidelity(model, [BERT.batch()])
    check()


@pytest.mark.parametrize("name", ["max_batches", "sequences"])
def test_refuses_limits_below_one(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, but got 0"):
        fidelity(fused_model(), [BERT.batch()], **{name: 0})


def test_parameters_and_flops_are_those_of_the_plain_models(report):
    original, narrow = BERT.make(), fuse(BERT.make(), FusionConfig())
    for model, parameters in zip((original, narrow), report.parameters, strict=True):
        assert parameters == sum(p.numel() for p in model.parameters())
    saved = 3 * 2 * (64 - 16) * 32  # three FFNs of two matrices, 32 wide
    assert report.flops[0] - report.flops[1] == pytest.approx(2 * saved)
    linear = [m for m in original.modules() if isinstance(m, nn.Linear)]
    a_token = sum(2 * m.weight.numel() for m in linear[:-2])
    a_sentence = sum(2 * m.weight.numel() for m in linear[-2:])  # pooler and classifier see the first token only
    attention = 3 * 2 * 2 * 7 * 32  # three layers, scores and values, 7 tokens, 32 wide
    assert report.flops[0] == pytest.approx(a_token + a_sentence / 7 + attention)


def test_the_table_names_every_ffn_and_its_figures(report):
    text = str(report)
    for ffn in report.ffns:
        line = next(line for line in text.splitlines() if line.startswith(ffn.name))
        assert "64 -> 16" in line and f"{ffn.ntk.adam.relative:.3g}" in line
    assert f"{report.outputs.absolute:.4g}" in text and "parameters" in text and "FLOPs" in text


def test_json_has_every_figure_and_is_strict(report, tmp_path):
    report.to_json(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert read["ntk"]["adam"]["relative"] == report.ntk.adam.relative
    cosine = report.ffns[2].matrices["output.dense"].sgd.cosine
    assert read["ffns"][2]["matrices"]["output.dense"]["sgd"]["cosine"] == cosine
    unknown = replace(report, hidden_states=OutputError(float("nan"), float("inf")))  # a model that has none
    unknown.to_json(tmp_path / "unknown.json")
    read = json.loads((tmp_path / "unknown.json").read_text(), parse_constant=pytest.fail)
    assert read["hidden_states"] == {"absolute": None, "relative": None} and "nan" in str(unknown)
    assert read["parameters"] == list(report.parameters) and "kernels" not in read


def test_the_plot_is_written(report, tmp_path):
    for name, start in (("plot.png", b"\x89PNG"), ("plot.pdf", b"%PDF")):
        report.plot(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)


def test_kernel_errors_by_their_definitions():
    generator = torch.Generator().manual_seed(0)
    kernel, original = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    error = KernelError.between(kernel, original)
    grid = torch.linspace(-3, 3, 600001, dtype=torch.float64)
    squares = [(a * kernel - original).square().sum() for a in (error.factor - 1e-3, error.factor, error.factor + 1e-3)]
    assert squares[1] < min(squares[0], squares[2]) and grid.min() < error.factor < grid.max()
    assert error.fitted == pytest.approx(float(squares[1].sqrt() / original.norm()))
    assert error.relative == pytest.approx(float((kernel - original).norm() / original.norm()))
    cosine = torch.nn.functional.cosine_similarity(kernel.flatten(), original.flatten(), dim=0)
    assert error.cosine == pytest.approx(float(cosine))
    assert KernelError.between(original, original).relative == 0
    assert KernelError.between(0 * kernel, original).relative == 1
    assert KernelError.between(kernel, 0 * kernel).relative == float("inf")
