"""`fidelity` against explicit loops: outputs by the formula of an FFN, kernels from whole gradients."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers as tf
from architectures import BY_NAME, Architecture
from peft import get_peft_model
from test_dynamics import duplicate_neurons
from torch import nn

from peft_fusion import FusionConfig, fuse
from peft_fusion.calibrate import calibrate
from peft_fusion.ffn import find_ffns, read_ffn
from peft_fusion.fidelity import fidelity

ALBERT = Architecture(
    "albert",
    "AlbertForSequenceClassification",
    lambda: tf.AlbertConfig(
        vocab_size=99,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=3,
    ),
    ffns=1,
    classifies=True,
    task_type="SEQ_CLS",
)
FALCON = Architecture(  # adds to an FFN's output in place
    "falcon",
    "FalconForCausalLM",
    lambda: tf.FalconConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, bos_token_id=1, eos_token_id=2
    ),
    width=128,
)
ARCHITECTURES = [
    *(BY_NAME[n] for n in ("bert", "modernbert", "llama_bias", "gpt2", "opt", "t5", "phi3")),
    ALBERT,
    FALCON,
]


def fused_model(architecture, **config) -> nn.Module:
    return get_peft_model(
        architecture.make().double(),
        FusionConfig(**{"ratio": 0.25, **config}),
        autocast_adapter_dtype=False,
    )


def batches(architecture) -> list[dict[str, torch.Tensor]]:
    return [architecture.batch(seed=1, size=3), architecture.batch(seed=2, size=2)]


def mean_output(output, sentence) -> torch.Tensor:
    return (output.logits**2).mean()


def check_kernels(report, model, data) -> None:
    """Compares a report's kernels with those of whole gradients."""
    parameters = dict(model.named_parameters())
    narrow = [p for name, p in parameters.items() if ".mlp_fusion_narrow." in name]
    wide = [p for name, p in parameters.items() if ".base_layer." in name]
    fused = whole_gradients(model, narrow, one_by_one(data))
    with model.disable_adapter():
        original = whole_gradients(model, wide, one_by_one(data))
    assert fused.shape[0] == 5 and fused.shape[1] < original.shape[1]
    for name, sign in (("sgd", lambda g: g), ("adam", torch.sign)):
        expected = [g @ sign(g).T for g in (original, fused)]
        for found, kernel in zip(report.kernels[name], expected, strict=True):
            torch.testing.assert_close(found, kernel, rtol=1e-5, atol=1e-5 * float(kernel.abs().max()))
        error = getattr(report.ntk, name)
        difference = (expected[1] - expected[0]).norm() / expected[0].norm()
        assert error.relative == pytest.approx(float(difference), rel=1e-5)


def whole_gradients(model, parameters, sentences) -> torch.Tensor:
    """A row of all gradients for each sentence."""
    rows = []
    for parameter in parameters:
        parameter.requires_grad_(True)
    for sentence in sentences:
        gradients = torch.autograd.grad(mean_output(model(**sentence), sentence), parameters)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def one_by_one(batch_list):
    return [{k: v[i : i + 1] for k, v in b.items()} for b in batch_list for i in range(len(b["input_ids"]))]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
@pytest.mark.parametrize("memory", [2**28, 1])
def test_kernels_are_those_of_whole_gradients(architecture, memory):
    model, data = fused_model(architecture), batches(architecture)
    check_kernels(fidelity(model, data, function=mean_output, memory=memory), model, data)


@pytest.mark.parametrize("name", ["bert", "gpt2", "phi3", "t5_gated"])
def test_kernels_of_low_rank_projections(name):
    model, data = fused_model(BY_NAME[name], method="svd"), batches(BY_NAME[name])
    report = fidelity(model, data, function=mean_output)
    check_kernels(report, model, data)
    assert {ffn.narrow_width for ffn in report.ffns} == {BY_NAME[name].width}


@pytest.mark.parametrize("name", ["bert", "gpt2", "phi3", "t5_gated"])
def test_kernels_of_projections_with_scales_on_both_sides(name):
    model, data = BY_NAME[name].make().double(), batches(BY_NAME[name])
    config = FusionConfig(ratio=0.25, scale="ntk")
    calibrate(model, config, data)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    scales = {key.split(".")[-1] for key, _ in model.named_buffers() if "narrow" in key}
    assert scales == {"scale"} and any(not torch.all(s == 1) for key, s in model.named_buffers() if "narrow" in key)
    check_kernels(fidelity(model, data, function=mean_output), model, data)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5_gated"])
def test_an_ffns_and_a_matrixs_kernel_are_over_its_own_weights(name):
    model, data = fused_model(BY_NAME[name]), batches(BY_NAME[name])
    report = fidelity(model, data, function=mean_output)
    assert len(report.ffns) == BY_NAME[name].ffns
    ffn = report.ffns[1]
    for path, errors in ffn.matrices.items():
        prefix = f"base_model.model.{ffn.name}.{path}."
        parameters = dict(model.named_parameters())
        of = {
            kind: [p for key, p in parameters.items() if key.startswith(prefix + kind)]
            for kind in ("mlp_fusion_narrow", "base_layer")
        }
        fused = whole_gradients(model, of["mlp_fusion_narrow"], one_by_one(data))
        with model.disable_adapter():
            original = whole_gradients(model, of["base_layer"], one_by_one(data))
        kernels = [g @ g.sign().T for g in (fused, original)]
        expected = float((kernels[0] - kernels[1]).norm() / kernels[1].norm())
        assert errors.adam.relative == pytest.approx(expected, rel=1e-5), path
    assert len(ffn.matrices) == (3 if name == "t5_gated" else 2)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_output_errors_are_those_of_the_narrow_ffn_on_the_originals_inputs(architecture):
    original, data = architecture.make().double(), batches(architecture)
    narrow = fuse(copy.deepcopy(original), FusionConfig(ratio=0.25))
    inputs: dict[str, list[torch.Tensor]] = {ffn.name: [] for ffn in find_ffns(original)}
    for ffn in find_ffns(original):
        ffn.projections[0].register_forward_pre_hook(
            lambda module, args, name=ffn.name: inputs[name].append(args[0].detach())
        )
    report = fidelity(fused_model(architecture), data)
    with torch.no_grad():
        for batch in data:
            original(**batch)
    for ffn, small, found in zip(find_ffns(original), find_ffns(narrow), report.ffns, strict=True):
        distances, norms = [], []
        for x in torch.cat([x.flatten(0, -2) for x in inputs[ffn.name]]):
            outputs = []
            for weights in (read_ffn(ffn), read_ffn(small)):
                ins = zip(weights.in_weights, weights.in_biases, strict=True)
                hidden = [w @ x + (0 if b is None else b) for w, b in ins]
                product = ffn.activation(hidden[0]) * (hidden[1] if weights.gated else 1)
                outputs.append(product @ weights.out_weight + (0 if weights.out_bias is None else weights.out_bias))
            distances.append((outputs[1] - outputs[0]).norm())
            norms.append(outputs[0].norm())
        mean = float(sum(distances) / len(distances))
        assert found.output.absolute == pytest.approx(mean, rel=1e-5)
        assert found.output.relative == pytest.approx(mean / float(sum(norms) / len(norms)), rel=1e-5)
        assert (found.name, found.width, found.narrow_width) == (ffn.name, ffn.width, small.width)


def test_ffns_are_given_the_originals_inputs_whatever_else_was_trained():
    architecture = BY_NAME["bert"]
    model, data = fused_model(architecture), batches(architecture)
    expected = [ffn.output for ffn in fidelity(model, data).ffns]
    embedding = model.base_model.model.bert.embeddings.word_embeddings.weight
    embedding.data.copy_(embedding.flip(0))
    trained = fidelity(model, data, reference=architecture.make().double())
    assert [ffn.output for ffn in trained.ffns] == expected
    assert [ffn.output for ffn in fidelity(model, data).ffns] != expected


def test_the_run_that_measures_ffns_follows_the_original_to_its_end():
    """A router, say, then decides as in the original."""
    architecture, seen = BY_NAME["bert"], []
    model = fused_model(architecture)
    model.base_model.model.bert.pooler.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    fidelity(model, batches(architecture)[:1])
    original, fused, following = seen[:3]
    assert torch.equal(following, original) and not torch.allclose(fused, original)


def test_errors_at_the_end_are_those_of_the_running_model():
    architecture = BY_NAME["llama"]
    model, data = fused_model(architecture), batches(architecture)
    report = fidelity(model, data)
    distances: dict[str, list[torch.Tensor]] = {"hidden": [], "logits": [], "kl": []}
    with torch.no_grad():
        for batch in data:
            ours = model(**batch, output_hidden_states=True)
            with model.disable_adapter():
                theirs = model(**batch, output_hidden_states=True)
            distances["hidden"].append((ours.hidden_states[-1] - theirs.hidden_states[-1]).norm(dim=-1).flatten())
            distances["logits"].append((ours.logits - theirs.logits).norm(dim=-1).flatten())
            log_p, log_q = theirs.logits.log_softmax(-1), ours.logits.log_softmax(-1)
            distances["kl"].append((log_p.exp() * (log_p - log_q)).sum(-1).flatten())
    assert report.hidden_states.absolute == pytest.approx(float(torch.cat(distances["hidden"]).mean()), rel=1e-6)
    assert report.outputs.absolute == pytest.approx(float(torch.cat(distances["logits"]).mean()), rel=1e-6)
    assert report.divergence == pytest.approx(float(torch.cat(distances["kl"]).mean()), rel=1e-4)
    assert "nats from the original's (KL)" in str(report)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_padding_counts_nowhere(name):
    model = fused_model(BY_NAME[name])
    batch = BY_NAME[name].batch(size=4)
    report = fidelity(model, [{k: v[i : i + 1, : 4 + i] for k, v in batch.items()} for i in range(4)])
    for filler in (0, 50):
        padded = {k: v.clone() for k, v in batch.items()}
        for i in range(4):
            padded["input_ids"][i, 4 + i :] = filler
            padded["attention_mask"][i, 4 + i :] = 0
        again = fidelity(model, [padded])
        for mine, other in zip(again.ffns, report.ffns, strict=True):
            assert mine.output.absolute == pytest.approx(other.output.absolute, rel=1e-9)
        assert again.divergence == pytest.approx(report.divergence, rel=1e-5)
        for kernel in ("adam", "sgd"):
            for found, expected in zip(again.kernels[kernel], report.kernels[kernel], strict=True):
                torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_duplicates_have_the_originals_adam_kernel_if_the_scale_stands_alone(name):
    errors = {}
    for method, scale in (("fusion", "counts"), ("fusion", "none"), ("clustering", "auto")):
        model = BY_NAME[name].make(intermediate_size=60).double()
        duplicate_neurons(model, distinct=20)
        config = FusionConfig(intermediate_size=20, method=method, scale=scale)
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
        errors[method, scale] = fidelity(model, batches(BY_NAME[name]))
    whole = errors["fusion", "counts"]
    for ffn in whole.ffns:
        assert ffn.output.relative < 1e-6 and ffn.ntk.adam.relative < 1e-6 and ffn.ntk.sgd.relative > 0.1
    assert whole.ntk.adam.relative < 1e-6 and abs(whole.ntk.adam.factor - 1) < 1e-6
    folded, clustering = errors["fusion", "none"], errors["clustering", "auto"]
    assert folded.outputs.relative < 1e-6 < 0.1 < min(folded.ntk.adam.relative, clustering.ntk.adam.relative)


def test_full_width_has_no_error():
    report = fidelity(fused_model(BY_NAME["gpt2"], ratio=1.0), batches(BY_NAME["gpt2"]))
    assert report.outputs.absolute < 1e-10 and report.ntk.sgd.relative < 1e-10 and report.ntk.adam.relative < 1e-6


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_plain_narrow_model_has_the_figures_of_its_adapter(name):
    architecture = BY_NAME[name]
    adapter = fidelity(fused_model(architecture, scale="none"), batches(architecture))
    original = architecture.make().double()
    narrow = fuse(copy.deepcopy(original), FusionConfig(ratio=0.25, scale="none"))
    plain = fidelity(narrow, batches(architecture), reference=original)
    assert [ffn.narrow_width for ffn in plain.ffns] == [architecture.width // 4] * 3
    assert str(plain) == str(adapter) and plain.parameters == adapter.parameters
    assert plain.ntk.adam.relative == pytest.approx(adapter.ntk.adam.relative)
    other = fidelity(fused_model(architecture), batches(architecture), reference=original)
    assert other.ntk == fidelity(fused_model(architecture), batches(architecture)).ntk


def test_only_fused_ffns_are_compared():
    model = fused_model(BY_NAME["llama"], layers_to_transform=[0, 2])
    report = fidelity(model, batches(BY_NAME["llama"]))
    assert [ffn.name for ffn in report.ffns] == ["model.layers.0.mlp", "model.layers.2.mlp"]


def test_a_trained_head_belongs_to_both_sides():
    model = fused_model(BY_NAME["bert"], task_type="SEQ_CLS", ratio=1.0)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.add_(1.0)
    assert fidelity(model, batches(BY_NAME["bert"])).outputs.absolute < 1e-10


def test_the_default_function_of_two_classes_is_their_difference():
    model = get_peft_model(BY_NAME["bert"].make(num_labels=2).double(), FusionConfig(), autocast_adapter_dtype=False)
    difference = lambda output, sentence: (output.logits[:, 0] - output.logits[:, 1]) / 2**0.5  # noqa: E731
    data = batches(BY_NAME["bert"])
    found, expected = fidelity(model, data), fidelity(model, data, function=difference)
    torch.testing.assert_close(found.kernels["adam"], expected.kernels["adam"])


def test_a_feature_model_and_the_seed_of_its_projection():
    bert = tf.BertModel(BY_NAME["bert"].config()).double().eval()
    model = get_peft_model(bert, FusionConfig(), autocast_adapter_dtype=False)
    data = [{**batch, "labels": batch["input_ids"][:, 0]} for batch in batches(BY_NAME["bert"])]
    reports = [fidelity(model, data, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(reports[0].kernels["sgd"][1], reports[1].kernels["sgd"][1])
    assert not torch.allclose(reports[0].kernels["sgd"][1], reports[2].kernels["sgd"][1])
    assert reports[0].outputs == reports[0].hidden_states
    assert math.isnan(reports[0].divergence) and "KL" not in str(reports[0])


def test_limits_on_batches_and_sentences():
    model = fused_model(BY_NAME["llama"])
    report = fidelity(model, batches(BY_NAME["llama"]), max_batches=1, sequences=2)
    assert report.batches == 1 and report.sequences == 2 and report.kernels["adam"][0].shape == (2, 2)
    report = fidelity(model, (b for b in batches(BY_NAME["llama"])), sequences=4)  # an iterator is read once
    assert report.batches == 2 and report.sequences == 4


def test_half_precision_gives_finite_figures():
    model = get_peft_model(BY_NAME["llama"].make().to(torch.bfloat16), FusionConfig())
    with torch.no_grad():
        report = fidelity(model, batches(BY_NAME["llama"]))
    exact = fidelity(fused_model(BY_NAME["llama"]), batches(BY_NAME["llama"]))
    assert report.ntk.sgd.relative == pytest.approx(exact.ntk.sgd.relative, rel=0.2)
    assert report.outputs.absolute == pytest.approx(exact.outputs.absolute, rel=0.2)
