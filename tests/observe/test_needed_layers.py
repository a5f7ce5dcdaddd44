"""Layers behind the last FFN that is looked at: they do not run, and what is seen of the others is the same."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME, Architecture

from peft_fusion.ffn import capture_each, find_all
from peft_fusion.observe.needed_layers import NeededLayers
from peft_fusion.observe.networks import Network

LLAMA = BY_NAME["llama"]


def seen(model, architecture: Architecture, watched: slice, resting: bool) -> list[torch.Tensor]:
    """What goes into some FFNs in three passes."""
    network, found = Network(model, find_all(model)[watched], fused=False), []
    layers = NeededLayers(network)
    with (
        network.running(),
        torch.no_grad(),
        capture_each(network.ffns, inputs=lambda name, x, routed: found.append(x.clone())),
    ):
        for seed in (1, 1, 2):
            with layers.running() if resting else nullcontext():
                network(architecture.batch(seed=seed))
    return found


@pytest.mark.parametrize("watched", [slice(0, 1), slice(1, 2), slice(None)], ids=["first", "second", "all"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_what_is_seen_is_the_same(architecture, watched, unchanged):
    model = architecture.make()
    check = unchanged(model)
    found = seen(model, architecture, watched, resting=True)
    check()
    expected = seen(model, architecture, watched, resting=False)
    assert len(found) == len(expected) >= 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("watched", "expected"), [(slice(0, 1), [3, 1, 1]), (slice(1, 2), [3, 3, 1])])
def test_after_the_first_pass_only_needed_layers_run(watched, expected):
    model, calls = LLAMA.make(num_hidden_layers=3), [0, 0, 0]
    for number, layer in enumerate(model.model.layers):
        layer.mlp.up_proj.register_forward_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    seen(model, LLAMA, watched, resting=True)
    assert calls == expected


def test_a_layer_that_runs_twice_needs_all(monkeypatch):
    model = LLAMA.make(num_hidden_layers=3)
    layers = model.model.layers
    layers.append(layers[0])
    model.config.num_hidden_layers = 4
    found = seen(model, LLAMA, slice(0, 1), resting=True)
    assert len(found) == 6
    assert all(torch.equal(a, b) for a, b in zip(found, seen(model, LLAMA, slice(0, 1), resting=False), strict=True))


def test_a_pass_that_fails_leaves_all_layers_as_they_were(unchanged):
    model = LLAMA.make(num_hidden_layers=3)
    check, network = unchanged(model), Network(model, find_all(model)[:1], fused=False)
    layers = NeededLayers(network)
    with layers.running():
        model(**LLAMA.batch())
    with pytest.raises(RuntimeError, match="stopped"), layers.running():
        model(**LLAMA.batch())
        raise RuntimeError("stopped")
    check()
