"""The Fisher information of FFN outputs: whose predictions it is of, and how its tokens count."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME
from torch import Tensor, nn

from peft_fusion.ffn import find_ffns
from peft_fusion.observe import fisher
from peft_fusion.observe.batches import batch_size, single_sequences
from peft_fusion.observe.fisher import _categorical, _gaussian, draws_of, fisher_information
from peft_fusion.observe.gradients import NoGradients, gradients_of_sequence
from peft_fusion.observe.networks import Network

Batch = dict[str, Tensor]


def fishers(model: nn.Module, batches: list[Batch], seed: int = 0) -> dict[str, Tensor]:
    network = Network(model, find_ffns(model), fused=False)
    with network.running():
        return fisher_information(network, [one for batch in batches for one in single_sequences(batch)], seed)


def second_moment_of_gradients(likelihood, value: Tensor) -> Tensor:
    """E[g g^T] over many draws at the same value, g the gradient by it."""
    rows = value.repeat(40000, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(likelihood(rows, [torch.Generator().manual_seed(0)]).sum(), rows)
    return gradient.T @ gradient / len(rows)


def test_the_fisher_information_of_a_softmax():
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0])
    p = logits.softmax(0)
    found = second_moment_of_gradients(_categorical, logits)
    torch.testing.assert_close(found, p.diag() - torch.outer(p, p), rtol=0.1, atol=0.005)


def test_the_fisher_information_of_a_gaussian():
    torch.testing.assert_close(second_moment_of_gradients(_gaussian, torch.ones(3)), torch.eye(3), rtol=0, atol=0.02)


def by_hand(model: nn.Module, sequences: list[Tensor], seed: int) -> Tensor:
    """Sum of d d^T for the last FFN of a Llama: draws, log-likelihoods and gradients by plain autograd."""
    total = torch.zeros(32, 32)
    for ids in sequences:
        kept: list[Tensor] = []

        def keep(module, args, output, kept=kept):
            output.retain_grad()
            kept.append(output)

        handle = model.model.layers[-1].mlp.down_proj.register_forward_hook(keep)
        logits = model(input_ids=ids).logits[0]
        handle.remove()
        probabilities = logits.detach().softmax(-1)
        uniform = torch.rand(1, len(logits), generator=draws_of({"input_ids": ids}, seed))[0]
        drawn = [int((p.cumsum(0) < u).sum()) for p, u in zip(probabilities, uniform, strict=True)]
        nn.functional.cross_entropy(logits, torch.tensor(drawn), reduction="sum").backward()
        for d in kept[0].grad[0]:
            total += torch.outer(d, d)
    return total


def lengths(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 99, (1, size), generator=generator) for size in sizes]


def test_what_is_drawn_depends_on_a_sequence_and_not_on_its_place():
    model, sequences = BY_NAME["llama"].make(), [{"input_ids": ids} for ids in lengths(7, 7, 7, 7)]
    found, other = fishers(model, sequences), fishers(model, sequences[::-1])
    for name, own in found.items():
        torch.testing.assert_close(other[name], own, rtol=1e-4, atol=1e-5 * float(own.abs().max()))
    assert not torch.allclose(fishers(model, sequences, seed=1)["model.layers.2.mlp"], own, rtol=1e-2)


def test_every_token_counts_alike_however_long_its_sequence_is():
    """Ten sequences of four tokens must not outweigh ten of forty, as a mean inside the likelihood makes them."""
    model = BY_NAME["llama"].make()
    short, long = lengths(*[4] * 10), lengths(*[40] * 10)
    found = fishers(model, [{"input_ids": ids} for ids in (*short, *long)], seed=3)["model.layers.2.mlp"]
    expected = by_hand(model, [*short, *long], seed=3)
    torch.testing.assert_close(found / found.trace(), expected / expected.trace(), rtol=1e-3, atol=1e-6)
    share = by_hand(model, short, seed=3).trace() / expected.trace()
    assert share < 0.3  # the short ones have a tenth of the tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_sequences_that_go_through_a_model_together_give_what_they_give_one_by_one(architecture, monkeypatch):
    model, batches = architecture.make(), [architecture.batch(size=5), architecture.batch(size=1)]
    expected, ran = fishers(model, batches), []
    monkeypatch.setattr(fisher, "sequences_at_once", lambda network: 3)
    monkeypatch.setattr(
        fisher,
        "gradients_of_sequence",
        lambda *given: ran.append(batch_size(given[1])) or gradients_of_sequence(*given),
    )
    for name, found in fishers(model, batches).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].abs().max()))
    assert max(ran) > 1 and sum(ran) == 6


def test_sequences_of_one_shape_go_together_and_padding_counts_for_nothing(monkeypatch):
    """Each with its own padding, on either side, and its own draws."""
    model, ids = BY_NAME["llama"].make(), lengths(7, 9, 12, 12)
    sequences = []
    for i, found in enumerate(ids):
        side = (12 - found.shape[1], 0) if i == 1 else (0, 12 - found.shape[1])
        masks = torch.nn.functional.pad(torch.ones_like(found), side)
        sequences.append({"input_ids": torch.nn.functional.pad(found, side, value=7), "attention_mask": masks})
    expected = fishers(model, sequences)["model.layers.2.mlp"]
    monkeypatch.setattr(fisher, "sequences_at_once", lambda network: 4)
    found = fishers(model, sequences)["model.layers.2.mlp"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_padding_adds_nothing():
    model, (ids,) = BY_NAME["llama"].make(), lengths(7)
    padded = {
        "input_ids": torch.cat([ids, torch.full((1, 5), 7)], dim=1),
        "attention_mask": torch.tensor([[1] * 7 + [0] * 5]),
    }
    found = fishers(model, [padded])["model.layers.2.mlp"]
    # draws for the padding are taken as well, behind those for the tokens
    expected = fishers(model, [{"input_ids": ids}])["model.layers.2.mlp"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_every_ffn_has_one(architecture, unchanged):
    model = architecture.make()
    check = unchanged(model)
    found = fishers(model, [architecture.batch(seed=seed, size=4) for seed in range(2)])
    check()
    assert len(found) == architecture.ffns
    for own in found.values():
        assert own.shape == (32, 32) and float(own.trace()) > 0
        assert (own - own.T).norm() <= 1e-5 * own.norm()  # as a whole: see test_calibrated_experts.py


@pytest.mark.parametrize(("name", "head", "matters"), [("bert", "classifier", False), ("llama", "lm_head", True)])
def test_a_language_model_predicts_tokens_and_a_classifier_its_hidden_states(name, head, matters):
    """The head of a classifier is new, so it must not matter; a language model's matters."""
    found = []
    for factor in (1.0, 3.0):
        model = BY_NAME[name].make()
        model.get_submodule(head).weight.data[:1] *= factor
        fisher = next(iter(fishers(model, [BY_NAME[name].batch(size=4)]).values()))
        found.append(fisher / fisher.trace())
    assert torch.equal(*found) != matters


def test_a_part_of_the_ffns_has_the_same_as_all():
    model = BY_NAME["llama"].make()
    batches = [{"input_ids": ids} for ids in lengths(5, 9)]
    whole = fishers(model, batches)
    network = Network(model, find_ffns(model)[1:2], fused=False)
    with network.running():
        (part,) = fisher_information(network, batches, 0).values()
    assert torch.equal(part, whole["model.layers.1.mlp"])


def test_a_model_without_gradients_says_so():
    model = BY_NAME["llama"].make()
    model.lm_head.forward = torch.no_grad()(model.lm_head.forward)
    with pytest.raises(NoGradients, match="does not depend on its FFNs in a way that autograd follows"):
        fishers(model, [BY_NAME["llama"].batch()])
    model = BY_NAME["llama"].make()
    model.lm_head.weight.data[:] = torch.inf
    with pytest.raises(NoGradients, match="not finite"):
        fishers(model, [BY_NAME["llama"].batch()])
