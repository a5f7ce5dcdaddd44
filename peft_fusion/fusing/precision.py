"""Products in full float32, whatever speed the user has asked matrix products for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Switches TF32 and autocast off, and restores them: three digits are too few for covariances.

    Args:
        device: the one that computes.
    """
    matmul = torch.backends.cuda.matmul
    # torch refuses to read the older switch where the newer one was used, but not the other way round
    switch, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, switch)
    setattr(matmul, switch, exact)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        setattr(matmul, switch, before)
