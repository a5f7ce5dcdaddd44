"""The Fisher information of FFN outputs: whose predictions it is of, and what becomes of models without gradients."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME
from peft import get_peft_model
from torch import Tensor, nn

from peft_fusion import FusionConfig, calibrate
from peft_fusion.ffn import find_ffns
from peft_fusion.observe.batches import single_sequences
from peft_fusion.observe.fisher import METRIC_SEQUENCES, _categorical, _gaussian, drawn_likelihood
from peft_fusion.observe.networks import Network
from peft_fusion.tuner.calibration import calibration_for
from peft_fusion.tuner.plan import plan_ffns


def fishers(model: nn.Module, config: FusionConfig) -> dict[str, Tensor | None]:
    calibration = calibration_for(model, plan_ffns(model, config))
    assert calibration is not None
    return {name: statistic.fisher for name, statistic in calibration.statistics.items()}


def second_moment_of_gradients(likelihood, value: Tensor) -> Tensor:
    """E[g g^T] over many draws at the same value, g the gradient by it."""
    rows = value.repeat(40000, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(likelihood(rows, torch.Generator().manual_seed(0)).sum(), rows)
    return gradient.T @ gradient / len(rows)


def test_the_fisher_information_of_a_softmax():
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0])
    p = logits.softmax(0)
    found = second_moment_of_gradients(_categorical, logits)
    torch.testing.assert_close(found, p.diag() - torch.outer(p, p), rtol=0.1, atol=0.005)


def test_the_fisher_information_of_a_gaussian():
    torch.testing.assert_close(second_moment_of_gradients(_gaussian, torch.ones(3)), torch.eye(3), rtol=0, atol=0.02)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_gradients_are_those_of_a_plain_backward_pass(name):
    """The outputs of the last FFN, by hooks and `backward`, over the same draws; of enough sentences, and no more."""
    architecture = BY_NAME[name]
    model, config = architecture.make(), FusionConfig(ratio=0.5)
    data = [architecture.batch(seed=seed, size=4) for seed in range(1 + METRIC_SEQUENCES // 4)]
    calibrate(model, config, data)
    sentences = [sentence for batch in data for sentence in single_sequences(batch)][:METRIC_SEQUENCES]
    side = Network(model, find_ffns(model), fused=False)
    last, draws = side.ffns[-1], torch.Generator().manual_seed(config.seed + 2)
    total = torch.zeros(32, 32)
    for sentence in sentences:
        kept: list[Tensor] = []

        def keep(module, args, output, kept=kept):
            output.retain_grad()
            kept.append(output)

        handle = last.projections[-1].register_forward_hook(keep)
        drawn_likelihood(side, sentence, draws).backward()
        handle.remove()
        gradient = kept[0].grad.flatten(0, -2)
        total += gradient.T @ gradient
    found = fishers(model, config)[last.name]
    torch.testing.assert_close(found / found.trace(), total / total.trace(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
@pytest.mark.filterwarnings("error:No gradients")
def test_every_ffn_has_one(architecture):
    model, config = architecture.make(), FusionConfig(ratio=0.5)
    calibrate(model, config, [architecture.batch(labels=True, seed=seed, size=4) for seed in range(3)])
    for fisher in fishers(model, config).values():
        assert fisher is not None and fisher.shape == (32, 32) and float(fisher.trace()) > 0
        torch.testing.assert_close(fisher, fisher.T)


def test_a_language_model_predicts_tokens_and_a_classifier_its_hidden_states():
    """The head of a classifier is new, so it must not matter; a language model's matters."""
    for name, head, matters in (("bert", "classifier", False), ("llama", "lm_head", True)):
        architecture, config = BY_NAME[name], FusionConfig(ratio=0.5)
        found = []
        for factor in (1.0, 3.0):
            model = architecture.make()
            model.get_submodule(head).weight.data[:1] *= factor
            calibrate(model, config, [architecture.batch(size=4)])
            fisher = next(iter(fishers(model, config).values()))
            found.append(fisher / fisher.trace())
        assert torch.equal(*found) != matters


def test_without_gradients_neurons_are_compared_by_their_outputs(unchanged):
    llama, config = BY_NAME["llama"], FusionConfig(ratio=0.5)
    model = llama.make()
    model.lm_head.forward = torch.no_grad()(model.lm_head.forward)
    check = unchanged(model)
    with pytest.warns(UserWarning, match="errors of its FFNs' outputs all count alike: RuntimeError"):
        calibrate(model, config, [llama.batch(size=8)])
    check(calibrated=True)
    assert set(fishers(model, config).values()) == {None}
    with pytest.raises(ValueError, match=r'`kernel="fisher"` needs gradients, .*; `kernel="outputs"` does not'):
        get_peft_model(model, FusionConfig(ratio=0.5, kernel="fisher"))
    check(calibrated=True)
    get_peft_model(model, config)
    assert config.fused_by["kernel"] == "outputs"
