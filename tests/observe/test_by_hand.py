"""Gradients and the Fisher information against formulas written out for a model of a few matrices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from peft_fusion.ffn import find_ffns
from peft_fusion.observe.fisher import fisher_information
from peft_fusion.observe.gradients import gradients_of_sequence
from peft_fusion.observe.networks import Network
from peft_fusion.observe.projection import random_projection

VOCABULARY, DIM, NEURONS, FFNS = 7, 4, 6, 2
SHORT, LONG = [[1, 2], [2, 3]], [4, 5, 6, 4, 6, 5, 5, 6, 4, 5, 6, 6]


class Tiny(nn.Module):
    """Tokens see the mean of those before them; FFNs on a residual stream; a head, or the hidden states as they are."""

    def __init__(self, speaks: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.blocks = nn.ModuleList()
        for _ in range(FFNS):
            block = nn.Module()
            block.fc1, block.fc2, block.act = nn.Linear(DIM, NEURONS), nn.Linear(NEURONS, DIM), nn.Tanh()
            self.blocks.append(block)
        self.head = nn.Linear(DIM, VOCABULARY, bias=False) if speaks else None
        for parameter in self.double().parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        self.embedding.weight.data *= torch.tensor([[0.25]] * 4 + [[4.0]] * 3)  # so that SHORT and LONG are unlike

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        weights = seen.unsqueeze(1).double().expand(-1, seen.shape[1], -1).tril()
        x = (weights / weights.sum(-1, keepdim=True).clamp(min=1)) @ self.embedding(input_ids)
        for block in self.blocks:
            x = x + block.fc2(block.act(block.fc1(x)))
            x = x + x.cumsum(1) / 5
        return SimpleNamespace(last_hidden_state=x) if self.head is None else SimpleNamespace(logits=self.head(x))


def by_hand(model: Tiny, ids: list[int], index: int, change: Tensor, inputs: list[Tensor] | None = None) -> Tensor:
    """What the model puts out, (tokens, dim), where a change is added to what one of its FFNs does; notes its input."""
    p = dict(model.named_parameters())
    length = len(ids)
    below = torch.ones(length, length, dtype=torch.float64).tril()
    x = below / below.sum(1, keepdim=True) @ p["embedding.weight"][ids]
    for block in range(FFNS):
        if block == index and inputs is not None:
            inputs.append(x.detach())
        weight, bias, out, out_bias = (p[f"blocks.{block}.{n}.{k}"] for n in ("fc1", "fc2") for k in ("weight", "bias"))
        x = x + torch.tanh(x @ weight.T + bias) @ out.T + out_bias + (change if block == index else 0)
        x = x + below @ x / 5
    return x if "head.weight" not in p else x @ p["head.weight"].T


def derivatives(model: Tiny, ids: list[int], index: int) -> tuple[Tensor, Tensor]:
    """The outputs (t, c), and their derivatives (t, c, s, d) by what an FFN puts out at token s."""
    none = torch.zeros(len(ids), DIM, dtype=torch.float64)
    return by_hand(model, ids, index, none), jacobian(lambda change: by_hand(model, ids, index, change), none)


def fisher_by_hand(model: Tiny, sequences: list[list[int]], index: int) -> Tensor:
    """E[d d^T] over tokens and draws: the sum of J^T C J, C the covariance of the score of an output."""
    total = torch.zeros(DIM, DIM, dtype=torch.float64)
    for ids in sequences:
        outputs, j = derivatives(model, ids, index)
        p = outputs.softmax(-1)
        scores = p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)
        if model.head is None:  # a Gaussian of unit variance around every output
            scores = torch.eye(DIM, dtype=torch.float64).expand(len(ids), -1, -1)
        total += torch.einsum("tcsd,tce,tesf->df", j, scores, j)
    return total / sum(map(len, sequences))


def distance(found: Tensor, expected: Tensor) -> float:
    """Between the shapes of two matrices, whatever their size."""
    found = found.double() / found.double().trace()
    return float((found - expected / expected.trace()).norm() / (expected / expected.trace()).norm())


def batch(ids: list[int]) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([ids])}


@pytest.mark.parametrize("speaks", [True, False])
def test_the_fisher_information_is_that_of_the_formula(speaks):
    """Every token counts alike, whichever sequence it is in: the short ones have a quarter of the tokens."""
    model = Tiny(speaks)
    side = Network(model, find_ffns(model), fused=False)
    found = fisher_information(side, [batch(ids) for ids in (*SHORT, LONG)] * 150, seed=0)
    for index, ffn in enumerate(side.ffns):
        assert distance(found[ffn.name], fisher_by_hand(model, [*SHORT, LONG], index)) < 0.15
    assert distance(found[side.ffns[0].name], fisher_by_hand(model, SHORT, 0)) > 0.3  # another one would be noticed


@pytest.mark.parametrize("speaks", [True, False])
def test_inputs_and_gradients_are_those_of_the_formula(speaks):
    model = Tiny(speaks)
    side = Network(model, find_ffns(model), fused=False)
    ids = LONG
    weights = torch.randn(len(ids), VOCABULARY if speaks else DIM, dtype=torch.float64)

    def function(sequence):
        output = side(sequence)
        return ((output.logits if speaks else output.last_hidden_state)[0] * weights).sum()

    found = gradients_of_sequence(side, batch(ids), function, 8.0)
    for index, ffn in enumerate(side.ffns):
        _, j = derivatives(model, ids, index)
        inputs: list[Tensor] = []
        by_hand(model, ids, index, torch.zeros(DIM), inputs)
        torch.testing.assert_close(found[ffn.name][0], inputs[0])
        torch.testing.assert_close(found[ffn.name][1] / 8.0, torch.einsum("tcsd,tc->sd", j, weights))


def test_padding_gives_no_gradient_and_changes_none():
    model = Tiny(True)
    side = Network(model, find_ffns(model), fused=False)
    function = random_projection(side, seed=0)
    ids = LONG
    mask = torch.tensor([[1] * len(ids) + [0] * 3])
    padded = {"input_ids": torch.tensor([[*ids, 0, 0, 0]]), "attention_mask": mask}
    evaluate = lambda sequence: function(side(sequence), sequence)  # noqa: E731
    plain, found = (gradients_of_sequence(side, sequence, evaluate, 1.0) for sequence in (batch(ids), padded))
    for name, (x, gradients) in plain.items():
        assert len(gradients) == len(ids)
        torch.testing.assert_close(found[name], (x, gradients))


@pytest.mark.parametrize("speaks", [True, False])
def test_the_projection_is_the_mean_over_tokens_in_one_direction(speaks):
    """And in one that softmax can see, of logits: a constant added to them changes nothing."""
    side = Network(Tiny(speaks), [], fused=False)
    mask = torch.tensor([[1, 1, 1, 0]])
    values = torch.randn(1, 4, VOCABULARY, dtype=torch.float64, requires_grad=True)
    output = SimpleNamespace(**{"logits" if speaks else "last_hidden_state": values})
    value = random_projection(side, seed=3)(output, {"input_ids": mask, "attention_mask": mask})
    (gradient,) = torch.autograd.grad(value, values)
    direction = 3 * gradient[0, 0]
    torch.testing.assert_close(gradient[0], torch.stack([direction] * 3 + [0 * direction]) / 3)
    assert float(direction.norm()) == pytest.approx(1)
    assert (abs(float(direction.sum())) < 1e-9) == speaks
    torch.testing.assert_close(value, (values[0, :3] @ direction).mean())
