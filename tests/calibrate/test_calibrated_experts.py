"""Routed experts calibrated: each by the tokens that are routed to it, like an FFN that sees no others."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import half, logits, relative, train
from moes import DEEPSEEK, GPT_OSS, LLAMA4, MIXTRAL, MOES, NEMOTRON_H, QWEN2
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import Trainer, TrainingArguments

from peft_fusion import FusionConfig, calibrate
from peft_fusion.calibrate import starved
from peft_fusion.ffn import find_all, find_experts, read_experts
from peft_fusion.fusing.calibrated import fuse_calibrated
from peft_fusion.fusing.methods import narrow_by
from peft_fusion.fusing.settle import settle
from peft_fusion.fusing.statistics import FFNStatistics
from peft_fusion.observe.fisher import FisherSum, drawn_likelihood, draws_of, fisher_information
from peft_fusion.observe.networks import Network
from peft_fusion.tuner.experts import NarrowExperts
from peft_fusion.tuner.handover import Calibrated, handed_over
from peft_fusion.tuner.recipe import asked_recipe

every = pytest.mark.parametrize("moe", MOES, ids=lambda a: a.name)
SEQUENCES = 32


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch):
    """Tiny models' random routers are not fair: of some 200 tokens an expert may get a dozen."""
    monkeypatch.setattr(starved, "FEWEST_TOKENS", 6)
    monkeypatch.setattr(starved, "FEWEST_HELD_OUT", 2)


def batches(moe, size: int = SEQUENCES) -> list[dict[str, Tensor]]:
    batch = moe.batch(size=size, labels=True)
    batch["attention_mask"][::5, -2:] = 0  # padding, which is routed as well
    return [{name: tensor[start : start + 8] for name, tensor in batch.items()} for start in range(0, size, 8)]


def made(model: nn.Module) -> Calibrated:
    calibrated = handed_over(model)
    assert calibrated is not None
    return calibrated


def narrow_experts(model: nn.Module) -> list[NarrowExperts]:
    return [module for module in model.modules() if isinstance(module, NarrowExperts)]


def calibrated(moe, **settings) -> nn.Module:
    model, config = moe.make(), half(moe, **settings)
    calibrate(model, config, batches(moe))
    return get_peft_model(model, config)


@contextmanager
def seen(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """(tokens, who they go to, by which weights, what comes out) of each call of an experts module, by a plain hook."""
    calls = []

    def hook(module, args, output):
        if output.requires_grad:
            output.retain_grad()
        calls.append((*args, output))

    handle = module.register_forward_hook(hook)
    yield calls
    handle.remove()


@every
def test_every_expert_is_calibrated_and_nothing_else_changes(moe, unchanged):
    model = moe.make().train()
    before, config = logits(model, moe), half(moe)
    check, state = unchanged(model.train()), torch.get_rng_state()
    calibrate(model, config, batches(moe))
    check(calibrated=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    names = {f"{e.name}.{i}" for e in find_experts(model) for i in range(e.count)}
    assert names <= made(model).narrow.keys()
    assert made(model).recipe.kernel == "fisher" and made(model).recipe.scale == "ntk"
    by_weights = relative(logits(get_peft_model(moe.make(), half(moe)), moe), before)
    fused = get_peft_model(model, config)
    assert relative(logits(fused, moe), before) < by_weights
    assert all(narrow.in_scale is not None for narrow in narrow_experts(fused))


@pytest.mark.parametrize("representative", ["neuron", "centroid"])
def test_an_expert_is_fused_as_a_dense_ffn_that_sees_its_tokens(representative):
    """By hand, of what a plain hook tells: its tokens, no padding, every fourth sequence held out, weights squared."""
    settings = {"kernel": "outputs", "scale": "none", "representative": representative, "n_init": 2}
    model, config = MIXTRAL.make(), half(MIXTRAL, **settings)
    calibrate(model, config, batches(MIXTRAL))
    experts = model.model.layers[1].mlp.experts
    with seen(experts) as calls, torch.no_grad():
        for batch in batches(MIXTRAL):
            model(**batch)
    mask = torch.cat([batch["attention_mask"] for batch in batches(MIXTRAL)]).bool().flatten()
    held_out = torch.arange(SEQUENCES).repeat_interleave(7) % 4 == 3
    x, chosen, weights = (torch.cat([call[i] for call in calls]) for i in range(3))
    for index in range(4):
        gate, up = experts.gate_up_proj[index].detach().chunk(2)
        weight = (weights * (chosen == index)).sum(1)
        mine = (chosen == index).any(1) & mask
        statistics = FFNStatistics(64, 32, weighted=True)
        to_fit, to_judge = mine & ~held_out, mine & held_out
        statistics.add(silu(x[to_fit] @ gate.T) * (x[to_fit] @ up.T), weight[to_fit].square())
        statistics.hold_out(x[to_judge], weight[to_judge].square())
        recipe = settle(asked_recipe(config), "by hand", gradients=True)
        ffn = read_experts(find_experts(model)[1])[index]
        if representative == "neuron":
            expected = fuse_calibrated(ffn, 32, statistics, silu, recipe)
        else:
            expected = with_centroids(ffn, statistics, recipe, x[to_fit], weight[to_fit].square())
        found = made(model).narrow[f"model.layers.1.mlp.experts.{index}"]
        for a, b in zip(found.folded().blocks(), expected.folded().blocks(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def with_centroids(ffn, statistics, recipe, x, weights):
    from peft_fusion.fusing.calibrated import cluster_centroids
    from peft_fusion.fusing.centroids import CentroidMoments

    moments = CentroidMoments(ffn, cluster_centroids(ffn, 32, statistics, silu, recipe), silu)
    moments.add_inputs(x, weights)
    return fuse_calibrated(ffn, 32, statistics, silu, recipe, centroids=moments)


@pytest.mark.parametrize("moe", [MIXTRAL, GPT_OSS, DEEPSEEK], ids=lambda a: a.name)
def test_the_metric_is_that_of_the_layers_output_times_the_routing_weight(moe):
    model = moe.make()
    sequences = [{"input_ids": ids[None]} for ids in moe.batch(size=3)["input_ids"]]
    network = Network(model, find_all(model), fused=False)
    with network.running():
        found = fisher_information(network, sequences, seed=0)
    experts = find_experts(model)[-1]
    expected = torch.zeros(experts.count, 32, 32)
    model.requires_grad_(True)
    for sequence in sequences:
        with seen(experts.module) as calls:
            (16 * drawn_likelihood(network, sequence, [draws_of(sequence, 0)])).backward()
        (_, chosen, weights, output), *_ = calls
        for index in range(experts.count):
            tokens, place = torch.where(chosen == index)
            d = output.grad.view(-1, 32)[tokens] * weights.detach()[tokens, place].unsqueeze(1)
            expected[index] += d.T @ d
    assert expected.flatten(1).any(1).sum() >= 3
    for index in range(experts.count):
        error = (found[f"{experts.name}.{index}"] - expected[index]).norm()
        # as a whole: what cancels to almost nothing keeps few digits; an expert without tokens has no metric at all
        assert error <= 1e-5 * expected[index].norm()


@pytest.mark.parametrize("moe", [m for m in MOES if m is not LLAMA4], ids=lambda a: a.name)  # it has one only
def test_implementations_agree_to_five_digits(moe):
    fused, found = calibrated(moe), []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        fused.get_base_model().set_experts_implementation(implementation)
        found.append(logits(fused, moe))
    assert relative(found[1], found[0]) < 1e-5 and relative(found[2], found[0]) < 1e-5


@pytest.mark.parametrize("moe", [MIXTRAL, GPT_OSS, NEMOTRON_H], ids=lambda a: a.name)
def test_the_scales_do_not_change_the_function(moe):
    plain, scaled = calibrated(moe, scale="none"), calibrated(moe)
    assert all(narrow.scale is None for narrow in narrow_experts(plain))
    assert any(not torch.equal(n.in_scale, torch.ones_like(n.in_scale)) for n in narrow_experts(scaled))
    assert relative(logits(scaled, moe), logits(plain, moe)) < 1e-4


def test_groups_give_the_same():
    """Where gradients are taken, the experts of other groups run by the host's own code, which rounds otherwise."""
    without_gradients = {"kernel": "outputs", "scale": "none"}
    for settings, tolerance in ((without_gradients, 0.0), ({}, 1e-2)):
        once, often = QWEN2.make(), QWEN2.make()
        calibrate(once, half(QWEN2, **settings), batches(QWEN2))
        calibrate(often, half(QWEN2, **settings), batches(QWEN2), ffns_per_pass=1)
        for name, narrow in made(once).narrow.items():
            other = made(often).narrow[name]
            for a, b in zip(narrow.weights.blocks(), other.weights.blocks(), strict=True):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("moe", [QWEN2, GPT_OSS], ids=lambda a: a.name)
def test_in_place_gives_what_calibrating_before_gives(moe, unchanged):
    fused = get_peft_model(moe.make(), half(moe))
    train(fused, moe)
    kept = dict(fused.named_parameters())
    calibrate(fused, dataloader=batches(moe))
    assert all(kept[name] is parameter for name, parameter in fused.named_parameters())
    assert torch.equal(logits(fused, moe), logits(calibrated(moe), moe))
    assert fused.peft_config["default"].fused_by["calibration"].startswith("32 sequences of data")


@pytest.mark.parametrize("moe", [QWEN2, GPT_OSS], ids=lambda a: a.name)
def test_saved_and_reloaded_bit_identically(moe, tmp_path):
    fused = calibrated(moe)
    train(fused, moe)
    expected = logits(fused, moe)
    fused.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(moe.make(), tmp_path), moe), expected)
    assert relative(logits(fused.merge_and_unload(), moe), expected) < 1e-5


def test_trainer_with_lora_on_the_attention_beside(tmp_path):
    model = MIXTRAL.make()
    config = half(MIXTRAL)
    calibrate(model, config, batches(MIXTRAL))
    model.add_adapter(config, "ffn")
    model.add_adapter(LoraConfig(target_modules=["q_proj", "o_proj"]), "attention")
    model.set_adapter(["ffn", "attention"])
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    rows = [{k: v[0] for k, v in MIXTRAL.batch(labels=True, seed=i, size=1).items()} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    losses = Trainer(model, arguments, train_dataset=rows).train()
    assert losses.training_loss > 0
    assert any("lora_" in name for name in start) and any("experts.mlp_fusion_narrow" in name for name in start)
    moved = {name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, start[name])}
    assert moved == start.keys()


def test_a_budget_across_layers_of_experts_and_dense_ffns():
    model, config = QWEN2.make(), half(QWEN2, allocation="fisher")
    calibrate(model, config, batches(QWEN2), ffns_per_pass=1)
    fused = get_peft_model(model, config)
    widths = config.fused_widths
    experts = widths["model.layers.1.mlp.experts"]
    assert all(now % 8 == 0 for _, now in widths.values())
    by_name = {ffn.name: ffn for ffn in find_all(QWEN2.make())}
    assert {name: [ffn.width, ffn.width] for name, ffn in by_name.items()} | widths != widths
    cost = {name: ffn.neuron_parameters for name, ffn in by_name.items()}
    assert cost["model.layers.1.mlp.experts"] == 4 * 3 * 32
    spent = sum(cost[name] * widths.get(name, [0, by_name[name].width])[1] for name in by_name)
    budget = sum(cost[name] * ffn.width // 2 for name, ffn in by_name.items())
    assert budget - 8 * max(cost.values()) < spent <= budget
    assert {narrow.width for narrow in narrow_experts(fused)} == {experts[1]}


def unchosen(model: nn.Module, index: int) -> nn.Module:
    """A DeepSeek whose router never chooses one of its experts."""
    model.model.layers[1].mlp.gate.e_score_correction_bias[index] = -1e9
    return model


def test_an_expert_that_no_token_reaches_is_fused_by_its_weights():
    model, config = unchosen(DEEPSEEK.make(), 2), half(DEEPSEEK)
    with pytest.warns(UserWarning, match=r"Of 4 experts, for want of tokens, 1 were fused by their weights"):
        calibrate(model, config, batches(DEEPSEEK))
    narrow = made(model).narrow
    expected = narrow_by(read_experts(find_experts(model)[0])[2], 24, settle(asked_recipe(half(DEEPSEEK))))
    found = narrow["model.layers.1.mlp.experts.2"]
    assert torch.equal(found.scale, expected.scale) and found.in_scales is None
    assert all(torch.equal(a, b) for a, b in zip(found.weights.blocks(), expected.weights.blocks(), strict=True))
    assert narrow["model.layers.1.mlp.experts.0"].in_scales is not None
    fused = get_peft_model(model, config)
    assert config.fused_by["calibration"].endswith("(model.layers.1.mlp.experts 2)")
    (layer,) = narrow_experts(fused)
    assert torch.equal(layer.in_scale[2], torch.ones_like(layer.in_scale[2]))


def test_experts_of_few_gradients_take_the_metric_of_their_layer(monkeypatch):
    module = importlib.import_module("peft_fusion.calibrate.inputs")
    monkeypatch.setattr(module, "METRIC_SEQUENCES", 2)
    model, config = MIXTRAL.make(), half(MIXTRAL)
    with pytest.warns(UserWarning, match=r"Of 8 experts, .* 8 took the metric of their layer"):
        calibrate(model, config, batches(MIXTRAL))
    assert "model.layers.0.mlp.experts 0 1 2 3; model.layers.1.mlp.experts 0 1 2 3" in made(model).recipe.calibration


def test_what_an_expert_gets_from_its_layer_has_the_size_of_its_own():
    (experts,) = find_experts(MIXTRAL.make().model.layers[0])
    products = [torch.randn(32, 32) for _ in range(4)]
    products = [p @ p.T * size for p, size in zip(products, (1.0, 2.0, 3.0, 0.01), strict=True)]
    sums = {f"{experts.name}.{i}": FisherSum(p, 9 if i == 3 else 32) for i, p in enumerate(products)}
    notes = starved.Starved()
    found = notes.metrics([experts], sums)
    assert notes.by_layer == {f"{experts.name}.3"}
    assert all(torch.equal(found[f"{experts.name}.{i}"], products[i]) for i in range(3))
    pooled = torch.stack(products).sum(0)
    torch.testing.assert_close(found[f"{experts.name}.3"], pooled / pooled.trace() * products[3].trace())


def test_experts_that_no_token_reaches_at_all_are_refused(unchanged):
    model = MIXTRAL.make()
    check = unchanged(model)
    masked = [{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])} for batch in batches(MIXTRAL)]
    with pytest.raises(ValueError, match="No token went through the FFN 'model.layers.0.mlp.experts'"):
        calibrate(model, half(MIXTRAL, kernel="outputs", scale="none"), masked)
    check()


def test_calibrating_for_other_widths_is_refused():
    model = MIXTRAL.make()
    calibrate(model, half(MIXTRAL), batches(MIXTRAL))
    with pytest.raises(ValueError, match="'model.layers.0.mlp.experts' 32 neurons wide, but the configuration asks"):
        get_peft_model(model, FusionConfig(ratio=0.25, task_type="CAUSAL_LM"))
