"""How much memory fusing takes beside the weights and the statistics, in matrices of neurons x neurons."""

from __future__ import annotations

import pytest
import torch
from allocated import Memory
from test_calibrated import draw, settled
from torch.nn.functional import silu

from peft_fusion.fusing.activations import hidden_activations
from peft_fusion.fusing.calibrated import fuse_calibrated
from peft_fusion.fusing.statistics import FFNStatistics
from peft_fusion.fusing.weights import FFNWeights, cast

WIDTH, DIM, TOKENS = 1024, 96, 512


@pytest.mark.parametrize(
    ("settings", "matrices"),
    [
        ({"kernel": "fisher"}, 4.5),
        ({"kernel": "outputs", "representative": "centroid"}, 4.5),
        ({"kernel": "ntk"}, 6.5),
        ({"method": "pruning"}, 4.5),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fusing_takes_the_memory_of_a_few_matrices(settings, matrices, dtype):
    ins = tuple(draw(WIDTH, DIM, seed=k).to(dtype) for k in range(2))
    weights = FFNWeights(ins, (None, None), draw(WIDTH, DIM, seed=3).to(dtype), None)
    statistics = FFNStatistics(WIDTH, DIM)
    statistics.add(hidden_activations(cast(weights, torch.float32), silu, draw(2000, DIM, seed=4)))
    statistics.hold_out(draw(TOKENS, DIM, seed=5).to(dtype))
    statistics.fisher = torch.eye(DIM)
    recipe = settled(statistics, **settings, **({} if "method" in settings else {"max_iter": 1}))
    with Memory() as memory:
        fuse_calibrated(weights, WIDTH // 2, statistics, silu, recipe)
    assert 2 < memory.peak / (4 * WIDTH**2) < matrices
