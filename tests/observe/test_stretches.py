"""Layers run stretch by stretch: what they put out is what they put out in a whole pass."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME
from torch import nn

from peft_fusion.ffn import find_all
from peft_fusion.observe.networks import Network
from peft_fusion.observe.stretches import Stretches, passed_on

LLAMA = BY_NAME["llama"]
TWO_LISTS = {"t5", "t5_gated"}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_a_stretch_puts_out_what_a_whole_pass_does(architecture, unchanged):
    model, batch = architecture.make(), architecture.batch(seed=1)
    check, network = unchanged(model), Network(model, find_all(model), fused=False)
    with network.running():
        stretches = Stretches.of(network, batch)
        assert (stretches is None) == (architecture.name in TWO_LISTS)
        if stretches is None:
            return
        outputs = stretches.outputs(network, batch)
        last = len(outputs) - 1
        assert last > 0
        other = architecture.batch(seed=2)  # what is not given is not needed
        with torch.no_grad(), stretches.running(last, last + 1, outputs[last - 1]) as noted:
            network({**other, "attention_mask": batch["attention_mask"]} if "attention_mask" in batch else other)
    assert list(noted) == [last]
    assert torch.equal(passed_on(noted[last]), passed_on(outputs[last]))
    check()


def test_only_the_layers_of_the_stretch_run():
    model, calls = LLAMA.make(num_hidden_layers=4), []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: calls.append(number))
    network, batch = Network(model, find_all(model), fused=False), LLAMA.batch()
    with network.running(), torch.no_grad():
        outputs = Stretches(model.model.layers).outputs(network, batch)
        calls.clear()
        for also in ([], [1], [0, 1, 3]):
            with Stretches(model.model.layers).running(1, 3, outputs[0], also) as noted:
                network(batch)
            assert list(noted) == ([1, 2] if also else [2])  # of those that ran
            assert all(torch.equal(output, outputs[number]) for number, output in noted.items())
    assert calls == [1, 2] * 3


class Remembering(nn.Module):
    """A layer that adds what the first layer of its model put out, whatever the one before it gives on."""

    def __init__(self, layer: nn.Module, memory: list[torch.Tensor], first: bool) -> None:
        super().__init__()
        self.layer, self.memory, self.first = layer, memory, first

    def forward(self, *args, **kwargs):
        output = self.layer(*args, **kwargs)
        if self.first:
            self.memory[:] = [output.sum(1, keepdim=True)]
            return output
        output = output + self.memory[0]
        self.memory[0] = self.memory[0] * 2
        return output


def test_layers_that_take_more_than_the_one_before_puts_out_have_no_stretches():
    model, memory = LLAMA.make(num_hidden_layers=3), []
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = Remembering(layer, memory, number == 0)
    network = Network(model, find_all(model), fused=False)
    with network.running():
        assert Stretches.of(network, LLAMA.batch()) is None


def test_layers_that_fail_without_another_one_have_no_stretches():
    model, memory = LLAMA.make(num_hidden_layers=3), []
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = Remembering(layer, memory, number == 0)
        model.model.layers[number].register_forward_pre_hook(lambda m, a: memory.clear() if m.first else None)
    last = model.model.layers[2]
    last.register_forward_hook(lambda *_: memory.clear())
    network = Network(model, find_all(model), fused=False)
    with network.running():
        assert Stretches.of(network, LLAMA.batch()) is None


def test_a_layer_that_runs_twice_has_no_stretches():
    model = LLAMA.make(num_hidden_layers=3)
    model.model.layers.append(model.model.layers[0])
    model.config.num_hidden_layers = 4
    network = Network(model, find_all(model), fused=False)
    with network.running():
        assert Stretches.of(network, LLAMA.batch()) is None


def test_a_stretch_that_fails_leaves_all_layers_as_they_were(unchanged):
    model = LLAMA.make(num_hidden_layers=3)
    check, network = unchanged(model), Network(model, find_all(model), fused=False)
    with pytest.raises(RuntimeError, match="stopped"), Stretches(model.model.layers).running(1, 2, torch.zeros(())):
        raise RuntimeError("stopped")
    check()
    with network.running(), torch.no_grad():
        network(LLAMA.batch())
