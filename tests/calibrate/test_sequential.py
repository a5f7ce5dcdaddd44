"""The sequential refit: FFN after FFN, in the company of the narrow ones before it."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, BY_NAME
from moes import DEEPSEEK, MIXTRAL
from peft import get_peft_model
from test_collect import batches

from peft_fusion import FusionConfig, calibrate
from peft_fusion.calibrate.inputs import HELD_OUT, Inputs
from peft_fusion.calibrate.sequential import refit_in_sequence, steps_of
from peft_fusion.ffn import capture, find_ffns, read_ffn
from peft_fusion.fusing import refit as fitting
from peft_fusion.fusing.methods import narrow_by
from peft_fusion.fusing.recipe import Recipe
from peft_fusion.fusing.settle import settle
from peft_fusion.observe.networks import Network
from peft_fusion.observe.stretches import Stretches, passed_on
from peft_fusion.tuner.plan import plan_ffns

LLAMA, BERT = BY_NAME["llama"], BY_NAME["bert"]
TWO_LISTS = {"t5", "t5_gated"}


def granite() -> tf.GraniteForCausalLM:
    """A Llama, but for that its layers add less than what their FFNs put out."""
    settings = {key: value for key, value in LLAMA.config().to_dict().items() if key != "model_type"}
    torch.manual_seed(0)
    return tf.GraniteForCausalLM(tf.GraniteConfig(**settings, residual_multiplier=0.3)).eval()


def fused(model, data, **settings):
    config = FusionConfig(ratio=0.5, **settings)
    calibrate(model, config, data)
    return get_peft_model(model, config)


def passed_on_by(model, layers, batch) -> list[torch.Tensor]:
    """What every layer of a model passes on."""
    network = Network(model, find_ffns(model), fused=True)
    with network.running():
        return [passed_on(output) for output in Stretches(layers).outputs(network, batch)]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_it_is_used_or_refused_before_any_work(architecture, unchanged):
    model = architecture.make()
    check, config = unchanged(model), FusionConfig(ratio=0.5, refit="sequential")
    data = batches(architecture, 4)
    if architecture.name in TWO_LISTS:
        reason = "its layers do not all run once"
        with pytest.raises(ValueError, match=rf'`refit="sequential"` cannot be used with this .*{reason}'):
            calibrate(model, config, data)
        return check()
    calibrate(model, config, data)
    check(calibrated=True)
    peft_model = get_peft_model(model, config)
    assert peft_model.peft_config["default"].fused_by["refit"] == "sequential"
    return None


def to_fit(found: list[torch.Tensor]) -> torch.Tensor:
    """Of what was seen batch by batch that of the training sequences, token by token."""
    sequences = torch.cat(found)
    return sequences[[i for i in range(len(sequences)) if i % HELD_OUT != HELD_OUT - 1]].flatten(0, 1)


def sum_in(model, layer: int, data) -> torch.Tensor:
    """What a layer adds up of the training sequences: a norm that it ends with comes behind."""
    found = []
    if hasattr(model, "model"):
        module = model.model.layers[layer]
        handle = module.register_forward_hook(lambda module, args, output: found.append(passed_on(output)))
    else:
        module = model.bert.encoder.layer[layer].output.LayerNorm
        handle = module.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    return to_fit(found)


@pytest.mark.parametrize(
    ("make", "architecture"),
    [(LLAMA.make, LLAMA), (BY_NAME["llama_bias"].make, LLAMA), (granite, LLAMA), (BERT.make, BERT)],
    ids=["llama", "bias", "granite", "bert"],
)
def test_every_ffn_leaves_what_none_of_its_neurons_can_explain(make, architecture, monkeypatch):
    """Least squares: what is still missing is orthogonal to the narrow hidden activations, in company."""
    data = [{"input_ids": batch["input_ids"]} for batch in batches(architecture, 24)]
    original = make()
    monkeypatch.setattr(fitting, "STRENGTHS", (1e-9,))
    monkeypatch.setattr(fitting.Problem, "unfitted", property(lambda problem: problem.middle))  # whatever held out says
    narrow = fused(make(), data, refit="sequential", scale="none")
    for layer, ffn in enumerate(find_ffns(narrow.base_model.model)):
        hidden: list[torch.Tensor] = []
        with capture([ffn], hidden=lambda name, values, hidden=hidden: hidden.append(values)):
            found = sum_in(narrow.base_model.model, layer, data)
        wanted = sum_in(original, layer, data).double()
        missing = (wanted - found) / wanted.norm(dim=1, keepdim=True)
        g = to_fit(hidden).double() / wanted.norm(dim=1, keepdim=True)
        left = (g.T @ missing).norm() / (g.norm() * missing.norm())
        assert left < 1e-3 or missing.norm() < 1e-4 * len(missing) ** 0.5


@pytest.mark.parametrize("scale", ["ntk", "none"])
def test_the_narrow_model_passes_on_what_is_nearer_to_the_original(scale):
    data, other = batches(LLAMA, 32), LLAMA.batch(seed=99)
    original = LLAMA.make(num_hidden_layers=4)
    expected = passed_on_by(original, original.model.layers, other)
    errors = {}
    for refit in ("ridge", "sequential"):
        model = fused(LLAMA.make(num_hidden_layers=4), data, refit=refit, scale=scale).base_model.model
        found = passed_on_by(model, model.model.layers, other)
        errors[refit] = [float((a - b).square().mean()) for a, b in zip(expected, found, strict=True)]
    assert errors["sequential"][0] == pytest.approx(errors["ridge"][0], rel=0.1)  # nothing before it is narrow
    assert errors["sequential"][-1] < 0.99 * errors["ridge"][-1]


def tried(model, data):
    """The steps that a refit of all of a model's FFNs would take."""
    network = Network(model, find_ffns(model), fused=False)
    with network.running():
        return steps_of(network, plan_ffns(model, FusionConfig(ratio=0.5)), Inputs(data, "data"))


def test_a_layer_that_multiplies_what_it_adds_is_known_by_that():
    assert [step.layer for step in tried(granite(), [LLAMA.batch()])] == [0, 1, 2]
    assert [step.factor for step in tried(granite(), [LLAMA.batch()])] == pytest.approx([0.3] * 3, rel=1e-3)
    assert [step.factor for step in tried(LLAMA.make().bfloat16(), [LLAMA.batch()])] == pytest.approx([1] * 3, rel=0.02)


def test_layers_that_end_in_a_norm_are_known_by_that_norm():
    model = BERT.make()
    steps = tried(model, [BERT.batch()])
    assert [step.norm for step in steps] == [layer.output.LayerNorm for layer in model.bert.encoder.layer]
    assert [step.factor for step in steps] == pytest.approx([1] * len(steps), rel=1e-3)
    assert all(step.norm is None for step in tried(LLAMA.make(), [LLAMA.batch()]))


def test_layers_that_put_out_lists_are_run_by_themselves():
    torch.manual_seed(0)
    model = tf.OpenAIGPTLMHeadModel(tf.OpenAIGPTConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4)).eval()
    assert [step.norm for step in tried(model, [LLAMA.batch()])] == [block.ln_2 for block in model.transformer.h]


def test_a_layer_runs_once_in_the_original_and_twice_in_the_narrow_model():
    model, data, calls = LLAMA.make(), batches(LLAMA, 5), [0, 0, 0]
    inputs, plan = Inputs(data, "data"), plan_ffns(model, FusionConfig(ratio=0.5))
    network = Network(model, find_ffns(model), fused=False)
    with network.running():
        steps = steps_of(network, plan, inputs)
        narrow = {p.ffn.name: narrow_by(read_ffn(p.ffn), p.width, settle(Recipe()), None) for p in plan}
        for number, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_hook(lambda *_, n=number: calls.__setitem__(n, calls[n] + 1))
        refit_in_sequence(network, steps, narrow, inputs)
    assert calls == [15, 15, 10]  # behind the last one nothing has to be known of it


@pytest.mark.parametrize(
    ("config", "model"),
    [(tf.Gemma2Config, tf.Gemma2ForCausalLM), (tf.Gemma3TextConfig, tf.Gemma3ForCausalLM)],  # Gemma 3 has more norms
    ids=["gemma2", "gemma3"],
)
def test_a_norm_between_ffn_and_sum_is_refused(config, model):
    given = LLAMA.config().to_dict()
    settings = {k: v for k, v in given.items() if k not in ("model_type", "layer_types", "rope_parameters")}
    gemma = model(config(**{**settings, "head_dim": 8})).eval()
    with pytest.raises(ValueError, match=r"the layer of 'model.layers.0.mlp' does more with what its FFN puts out"):
        tried(gemma, [LLAMA.batch()])


def test_routed_experts_keep_their_own_refit():
    data = batches(MIXTRAL, 12)
    with pytest.raises(ValueError, match="it refits dense FFNs, and none of those that become narrower is one"):
        fused(MIXTRAL.make(), data, refit="sequential")
    ridge, sequential = (fused(DEEPSEEK.make(), data, refit=refit, scale="none") for refit in ("ridge", "sequential"))
    states = [model.state_dict() for model in (ridge, sequential)]
    changed = {name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])}
    assert changed and all("down_proj" in name and ".experts." not in name for name in changed)
    assert any("shared_experts" in name for name in changed)  # they make up for the routed ones


@pytest.mark.parametrize("architecture", [LLAMA, BERT], ids=lambda a: a.name)
def test_padding_is_left_out(architecture):
    short = [{"input_ids": batch["input_ids"]} for batch in batches(architecture, 12)]
    padded = [
        {
            "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 5), value=7),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(batch["input_ids"]), (0, 5)),
        }
        for batch in short
    ]
    settings = {"refit": "sequential", "kernel": "outputs", "scale": "none"}
    expected, found = (fused(architecture.make(), data, **settings).state_dict() for data in (short, padded))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_ffns_that_a_budget_leaves_whole_are_passed_by():
    model = LLAMA.make(num_hidden_layers=5)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(30)  # so that it and what is before it is dear
    config = FusionConfig(ratio=0.6, allocation="fisher", refit="sequential", multiple_of=8)
    calibrate(model, config, batches(LLAMA, 12))
    get_peft_model(model, config)
    assert config.fused_widths and len(config.fused_widths) < 5


def test_interrupted_it_leaves_the_model_as_it_was(monkeypatch, unchanged):
    model, calls = LLAMA.make(), []

    def interrupted(problem):
        calls.append(problem)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fitting.refit(problem)

    check = unchanged(model)
    monkeypatch.setattr(sys.modules["peft_fusion.calibrate.sequential"], "refit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, FusionConfig(ratio=0.5, refit="sequential"), batches(LLAMA, 8))
    check()
    assert len(calls) == 2
