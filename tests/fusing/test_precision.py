"""Products in full float32, whatever the user allows for speed."""

from __future__ import annotations

import pytest
import torch
from test_calibrated import DIM, draw, gather, make, settled
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode

from peft_fusion.fusing.calibrated import cluster_centroids, fuse_calibrated
from peft_fusion.fusing.centroids import CentroidMoments
from peft_fusion.fusing.precision import exact_products
from peft_fusion.fusing.statistics import FFNStatistics

MATMUL = torch.backends.cuda.matmul
SWITCH, ON = ("fp32_precision", "tf32") if hasattr(MATMUL, "fp32_precision") else ("allow_tf32", True)


def allowed() -> bool:
    return getattr(MATMUL, SWITCH) == ON


@pytest.fixture(params=sorted({"allow_tf32", SWITCH}))
def tf32(request):
    """TF32 switched on by either of torch's switches, as users do for speed."""
    before = getattr(MATMUL, SWITCH)
    setattr(MATMUL, request.param, ON if request.param == SWITCH else True)
    assert allowed()
    yield
    setattr(MATMUL, SWITCH, before)


class Watch(TorchDispatchMode):
    """Notes whether TF32 was allowed in each product."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in function.__name__:
            self.allowed.append(allowed())
        return function(*args, **(kwargs or {}))


def products(call) -> list[bool]:
    """Whether TF32 was allowed in each matrix product of a call."""
    with Watch() as watch:
        call()
    assert watch.allowed
    return watch.allowed


def test_tf32_is_off_in_all_products_of_calibration_and_on_again_afterwards(tf32):
    weights, inputs = make(gated=True), draw(50, DIM, seed=3)
    statistics, hidden = gather(weights, silu), draw(50, 16, seed=4)
    assert not any(products(lambda: FFNStatistics(16, DIM).add(hidden)))
    statistics.fisher = torch.eye(DIM)
    recipe = settled(statistics, representative="centroid")
    assert not any(products(lambda: fuse_calibrated(weights, 8, statistics, silu, settled(statistics))))
    narrow = cluster_centroids(weights, 8, statistics, silu, recipe)
    assert not any(products(lambda: cluster_centroids(weights, 8, statistics, silu, recipe)))
    moments = CentroidMoments(weights, narrow, silu)
    assert not any(products(lambda: moments.add_inputs(inputs)))
    assert allowed()


def test_tf32_is_on_again_after_an_error(tf32):
    with pytest.raises(KeyError), exact_products(torch.device("cpu")):
        assert not allowed()
        raise KeyError
    assert allowed()


def test_autocast_is_off_in_exact_products():
    a = draw(8, 8, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ a.T).dtype == torch.bfloat16
        with exact_products(a.device):
            assert (a @ a.T).dtype == torch.float32
        assert (a @ a.T).dtype == torch.bfloat16
