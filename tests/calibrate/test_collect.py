"""What one forward pass over the inputs collects: products of the right tokens, and a sample of the others."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME, Architecture
from torch import Tensor, nn

from peft_fusion import FusionConfig
from peft_fusion.calibrate.collect import collect, collect_centroids
from peft_fusion.calibrate.inputs import Inputs
from peft_fusion.ffn import find_activation, find_ffns, read_ffn
from peft_fusion.fusing.calibrated import cluster_centroids
from peft_fusion.fusing.settle import settle
from peft_fusion.fusing.statistics import SAMPLE_TOKENS, FFNStatistics
from peft_fusion.observe.networks import Network
from peft_fusion.tuner.recipe import asked_recipe

Batch = dict[str, Tensor]


def batches(architecture: Architecture, count: int = 3, size: int = 4) -> list[Batch]:
    return [architecture.batch(labels=True, seed=seed, size=size) for seed in range(count)]


def collected(model: nn.Module, data: list[Batch]) -> dict[str, FFNStatistics]:
    network = Network(model, find_ffns(model), fused=False)
    with network.running():
        return collect(network, Inputs(data, "data"))


def naive(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What goes into every FFN's out-projection, one row a token, by plain hooks."""
    hidden: dict[str, Tensor] = {}
    handles = []
    for ffn in find_ffns(model):

        def hook(module, args, name=ffn.name):
            hidden[name] = args[0].reshape(-1, args[0].shape[-1])

        handles.append(ffn.projections[-1].register_forward_pre_hook(hook))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return hidden


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_moments_are_those_of_the_tokens_that_are_not_held_out(architecture, unchanged):
    model, data = architecture.make(), batches(architecture)
    check = unchanged(model)
    statistics = collected(model, data)
    check()
    assert len(statistics) == architecture.ffns
    seen: dict[str, list[Tensor]] = {name: [] for name in statistics}
    for batch in data:
        for name, hidden in naive(model, batch).items():
            seen[name].append(hidden.view(4, -1, architecture.width)[:3].flatten(0, 1))  # every fourth is held out
    for name, statistic in statistics.items():
        h = torch.cat(seen[name]).double()
        torch.testing.assert_close(statistic.second_moment.double(), h.T @ h / len(h), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistic.covariance.double(), torch.cov(h.T, correction=0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistic.mean, h.mean(0), rtol=1e-5, atol=1e-6)
        assert (statistic.tokens, statistic.held_out_tokens) == (3 * 3 * 7, 3 * 7)
        assert statistic.held_out.shape == (21, 32)


@pytest.mark.parametrize("name", ["bert", "opt", "t5", "llama"])
def test_padding_is_left_out(name):
    architecture = BY_NAME[name]
    batch = architecture.batch(size=4)
    extra = torch.full((4, 5), 7)
    longer = {k: torch.cat([v, extra * (k != "attention_mask")], dim=1) for k, v in batch.items()}
    if "decoder_input_ids" in longer:
        longer["decoder_attention_mask"] = longer["attention_mask"]
    short, padded = collected(architecture.make(), [batch]), collected(architecture.make(), [longer])
    for ffn, statistic in short.items():
        other = padded[ffn]
        assert (other.tokens, other.held_out_tokens) == (statistic.tokens, statistic.held_out_tokens)
        torch.testing.assert_close(other.second_moment, statistic.second_moment, rtol=1e-3, atol=1e-4)


def test_padding_is_left_out_under_chunking():
    """BERT's FFNs may get some positions of all sequences at a time (`chunk_size_feed_forward`)."""
    bert = BY_NAME["bert"]
    batch = bert.batch(size=4)
    longer = {k: torch.cat([v, torch.full((4, 5), 7) * (k != "attention_mask")], dim=1) for k, v in batch.items()}
    whole, chunked = bert.make(), bert.make()
    for layer in chunked.bert.encoder.layer:
        layer.chunk_size_feed_forward = 3
    expected, found = collected(whole, [longer]), collected(chunked, [longer])
    for name, statistic in expected.items():
        assert found[name].tokens == statistic.tokens == 3 * 7
        torch.testing.assert_close(found[name].second_moment, statistic.second_moment)
        kept = (one.held_out[one.held_out[:, 0].argsort()] for one in (found[name], statistic))  # in another order
        torch.testing.assert_close(*kept, rtol=1e-6, atol=1e-6)


def test_the_held_out_sample_is_bounded():
    statistics = FFNStatistics(4, 3)
    for _ in range(3):
        statistics.hold_out(torch.randn(SAMPLE_TOKENS // 2, 3))
    assert statistics.held_out.shape == (SAMPLE_TOKENS, 3)


def test_activations_that_are_not_finite(unchanged):
    bert = BY_NAME["bert"]
    model = bert.make()
    model.bert.embeddings.LayerNorm.weight.data[:] = torch.nan
    check = unchanged(model)
    with pytest.raises(ValueError, match=r"At the FFN 'bert.encoder.layer.0' the .* NaN .*sequences 0 to 3"):
        collected(model, batches(bert))
    check()


def test_tokens_that_are_all_padding():
    bert = BY_NAME["bert"]
    with pytest.raises(ValueError, match="No token went through the FFN 'bert.encoder.layer.0'"):
        collected(bert.make(), [{**bert.batch(size=4), "attention_mask": torch.zeros(4, 7)}])


def test_centroids_are_refitted_to_all_training_tokens():
    """The out-projection against ridge regression written out, on the tokens that are not held out."""
    bert = BY_NAME["bert"]
    data = batches(bert, count=6)
    model, config = bert.make(), FusionConfig(ratio=0.5, representative="centroid", kernel="outputs", scale="none")
    network = Network(model, find_ffns(model), fused=False)
    with network.running():
        statistics = collect(network, Inputs(data, "data"))
        recipe = settle(asked_recipe(config), "data")
        ffn = network.ffns[0]
        known = (read_ffn(ffn), 32, statistics[ffn.name], find_activation(ffn), recipe)
        centroids = {f.name: cluster_centroids(read_ffn(f), 32, statistics[f.name], *known[3:]) for f in network.ffns}
        moments = collect_centroids(network, centroids, Inputs(data, "data"))[ffn.name].moments()
    inputs = torch.cat([_inputs(model, batch).view(4, 7, 32)[:3].flatten(0, 1) for batch in data])
    act, narrow = find_activation(ffn), centroids[ffn.name]
    g = act(inputs @ narrow.weights.in_weights[0].T + narrow.weights.in_biases[0]) * narrow.scale
    weights = read_ffn(ffn)
    y = act(inputs @ weights.in_weights[0].T + weights.in_biases[0]) @ weights.out_weight
    both = torch.cov(torch.cat([g, y], dim=1).double().T, correction=0)
    torch.testing.assert_close(moments.gram, both[:32, :32], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments.cross, both[:32, 32:], rtol=1e-4, atol=1e-6)


def _inputs(model: nn.Module, batch: Batch) -> Tensor:
    """What goes into the first FFN."""
    kept = []
    handle = find_ffns(model)[0].projections[0].register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return kept[0]
