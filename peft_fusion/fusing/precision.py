"""How exactly matrix products are computed: in full float32 where digits count, in bfloat16 where speed does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

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


def fast_products(device: torch.device) -> AbstractContextManager:
    """Computes products in bfloat16, weights staying as they are, on a device that has instructions for it.

    Its rounding is 0.4 % of a value.

    Args:
        device: the one that computes.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device))


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
