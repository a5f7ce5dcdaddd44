"""How much memory fusing takes beside the weights and the statistics, in matrices of neurons x neurons."""

from __future__ import annotations

import weakref

import pytest
import torch
from test_calibrated import draw, settled
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_fusion.fusing.activations import hidden_activations
from peft_fusion.fusing.calibrated import fuse_calibrated
from peft_fusion.fusing.statistics import FFNStatistics
from peft_fusion.fusing.weights import FFNWeights, cast

WIDTH, DIM, TOKENS = 1024, 96, 512


class Memory(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are still alive, and the most there have been."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id_of(tensor) not in given | self.alive.keys():
                storage = tensor.untyped_storage()
                self.alive[id_of(tensor)] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, id_of(tensor), None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def id_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


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
