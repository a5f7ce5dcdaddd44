"""Backward passes layer by layer: the same gradients, with no more than one layer's graph and weights at a time."""

from __future__ import annotations

import weakref

import pytest
import torch
from accelerate import dispatch_model
from allocated import Memory
from architectures import ARCHITECTURES, BY_NAME, Architecture

from peft_fusion.ffn import fetching_hook, find_ffns
from peft_fusion.observe.fisher import drawn_likelihood
from peft_fusion.observe.gradients import gradients_of_sequence
from peft_fusion.observe.networks import Network
from peft_fusion.observe.recomputed import Recomputed

BERT, LLAMA = BY_NAME["bert"], BY_NAME["llama"]


def gradients(model: torch.nn.Module, architecture: Architecture, watched: slice = slice(None), **batch: int):
    network = Network(model, find_ffns(model)[watched], fused=False)
    draws = [torch.Generator().manual_seed(0)]

    def likelihood(batch):
        return drawn_likelihood(network, batch, draws)

    with network.running():
        return gradients_of_sequence(network, architecture.batch(size=1, **batch), likelihood, 1.0)


@pytest.fixture
def whole_graph(monkeypatch):
    """Calling it has gradients taken through the graph of the whole model."""
    return lambda: monkeypatch.setattr(Recomputed, "of", lambda model: Recomputed([]))


@pytest.mark.parametrize("watched", [slice(None), slice(1, 2)], ids=["all", "one"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_gradients_are_those_of_the_whole_graph(architecture, watched, whole_graph, unchanged):
    model = architecture.make()
    check = unchanged(model)
    found = gradients(model, architecture, watched)
    check()
    assert Recomputed.of(model).layers
    whole_graph()
    expected = gradients(model, architecture, watched)
    for name, (x, d) in expected.items():
        assert torch.equal(found[name][0], x) and torch.equal(found[name][1], d) and bool(d.any())


@pytest.mark.parametrize(("watched", "expected"), [(slice(None), [1, 2, 2]), (slice(1, 2), [1, 1, 2])])
def test_only_what_a_gradient_goes_through_is_computed_again(watched, expected):
    """In BERT a normalisation comes behind the FFN, so that even the first layer keeps something for its gradient."""
    model, calls = BERT.make(num_hidden_layers=3), [0, 0, 0]
    for number, layer in enumerate(model.bert.encoder.layer):
        layer.intermediate.register_forward_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    gradients(model, BERT, watched)
    assert calls == expected


def test_a_graph_does_not_grow_by_what_layers_compute(whole_graph):
    config = {"num_hidden_layers": 8, "intermediate_size": 512}
    model = LLAMA.make(**config)
    peaks = []
    for prepare in (lambda: None, whole_graph):
        prepare()
        with Memory() as memory:
            gradients(model, LLAMA)
        peaks.append(memory.peak)
    assert peaks[0] < 0.4 * peaks[1]


class Fetched(dict):
    """Weights by name; counts the bytes of what was taken of all of them and is still alive."""

    alive, peak = 0, 0

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = super().__getitem__(name).clone()
        size = tensor.untyped_storage().nbytes()
        Fetched.alive += size
        Fetched.peak = max(Fetched.peak, Fetched.alive)
        weakref.finalize(tensor.untyped_storage(), self.freed, size)
        return tensor

    def freed(self, size: int) -> None:
        Fetched.alive -= size


def test_no_more_than_one_layer_is_fetched_at_a_time(tmp_path):
    model = LLAMA.make(num_hidden_layers=6)
    layer = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    places = {f"model.layers.{i}": "disk" for i in range(6)} | {"model.embed_tokens": "cpu", "lm_head": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu"}
    expected = gradients(LLAMA.make(num_hidden_layers=6), LLAMA)
    dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    for module in model.modules():
        if (hook := fetching_hook(module)) is not None and (
            names := [n for n, _ in module.named_parameters(recurse=False)]
        ):
            hook.weights_map = Fetched({name: hook.weights_map[name] for name in names})
    Fetched.alive = Fetched.peak = 0
    found = gradients(model, LLAMA)
    assert 0 < Fetched.peak <= layer and Fetched.alive == 0
    for name, (_, d) in expected.items():
        assert torch.equal(found[name][1], d)
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())
