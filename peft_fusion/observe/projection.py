"""The scalar function f whose tangent kernels are compared, one number a sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .batches import padding_mask
from .networks import Batch, Network
from .outputs import main_output

Function = Callable[[Any, Batch], Tensor]


def random_projection(network: Network, seed: int) -> Function:
    """f: what the model puts out, averaged over a sequence's tokens, in a fixed random direction.

    Of logits a direction that softmax can see: it sums to 0 (their sum is what no cross-entropy depends on).

    Args:
        network: the network whose outputs it takes, for what its decoder's mask is.
        seed: of the direction.

    Returns:
        A function of the model's output and a batch of one sequence, to a tensor without dimensions.
    """

    def function(output: Any, sequence: Batch) -> Tensor:
        value = main_output(output)
        assert value is not None
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        dim = value.shape[-1]
        direction = torch.randn(dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        if getattr(output, "logits", None) is not None and dim > 1:
            direction -= direction.mean()
        projected = value @ (direction / direction.norm()).to(value)
        mask = padding_mask(sequence, value.shape, network.is_encoder_decoder)
        return projected.mean() if mask is None else projected[mask.to(projected.device)].mean()

    return function
