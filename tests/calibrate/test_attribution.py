"""What each FFN contributes is the derivative of the divergence by its error, with all other errors in place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from architectures import BY_NAME
from test_collect import batches

from peft_fusion.calibrate.attribution import contributions
from peft_fusion.ffn import find_ffns, read_ffn
from peft_fusion.fusing.weights import NarrowFFN
from peft_fusion.observe.batches import single_sequences
from peft_fusion.observe.networks import Network


def erring(model, sizes) -> dict[str, NarrowFFN]:
    """FFNs that put out (1 + size) times what the original ones do."""
    found = {}
    for ffn, size in zip(find_ffns(model), sizes, strict=True):
        weights = read_ffn(ffn)
        out = weights.out_weight.detach() * (1 + size)
        bias = None if weights.out_bias is None else weights.out_bias.detach() * (1 + size)
        found[ffn.name] = NarrowFFN(replace(weights, out_weight=out, out_bias=bias), torch.ones(weights.width))
    return found


def measured(model, sizes, architecture):
    network = Network(model, find_ffns(model), fused=False)
    sequences = [one for batch in batches(architecture, 2) for one in single_sequences(batch)]
    with network.running():
        return contributions(network, erring(model, sizes), sequences)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_it_is_the_derivative_by_how_much_of_an_error_there_is(name, unchanged):
    architecture = BY_NAME[name]
    model = architecture.make().double()
    check = unchanged(model)
    sizes, step = [0.3 + 0.1 * i for i in range(architecture.ffns)], 0.02
    _, parts = measured(model, sizes, architecture)
    assert list(parts) == [ffn.name for ffn in find_ffns(model)]
    for i, part in enumerate(parts.values()):
        more, less = ([s * (1 + h * (i == j)) for j, s in enumerate(sizes)] for h in (step, -step))
        difference = measured(model, more, architecture)[0] - measured(model, less, architecture)[0]
        assert part == pytest.approx(difference / (2 * step), rel=2e-2, abs=1e-7)
    check()


def test_small_errors_contribute_twice_the_divergence():
    divergence, parts = measured(BY_NAME["llama"].make().double(), [0.02, -0.01, 0.01], BY_NAME["llama"])
    assert sum(parts.values()) == pytest.approx(2 * divergence, rel=0.05)


def test_errors_that_make_up_for_each_other_contribute_less():
    """What the second FFN does to the predictions is what the first one does, with its sign or the other one."""
    model = BY_NAME["llama"].make().double()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.mul_(0.03)  # so that all FFNs see nearly the same
            layer.mlp.load_state_dict(model.model.layers[0].mlp.state_dict())
    _, apart = measured(model, [0.5, 0.0, 0.0], BY_NAME["llama"])
    _, same = measured(model, [0.5, 0.5, 0.0], BY_NAME["llama"])
    _, opposite = measured(model, [0.5, -0.45, 0.0], BY_NAME["llama"])
    first = find_ffns(model)[0].name
    assert same[first] == pytest.approx(2 * apart[first], rel=0.1)
    assert opposite[first] == pytest.approx(0.1 * apart[first], rel=0.5)
