"""What calibration remembers of an FFN: products and a bounded sample, never all activations."""

from __future__ import annotations

import torch
from torch import Tensor

from .scales import Tangents

SAMPLE_TOKENS = 2048
"""Held-out tokens whose inputs are kept, in the model's dtype: 4.7 MB an FFN at 576 dimensions in float32."""


class FFNStatistics:
    """Second moments of an FFN's hidden activations, a sample of its inputs, and what gradients told of it.

    Memory: 4 * neurons ** 2 bytes for the products, `SAMPLE_TOKENS` inputs, and once they are set the `tangents` and
    the `fisher` information, 4 * out_dim ** 2 bytes.

    Args:
        width: the FFN's neurons.
        in_dim: the dimension of its inputs.
        device: where to accumulate.
    """

    def __init__(self, width: int, in_dim: int, device: torch.device | str = "cpu") -> None:
        self.product = torch.zeros(width, width, device=device)
        self.sum = torch.zeros(width, device=device)
        self.tokens = 0
        self.width, self.in_dim = width, in_dim
        self._held_out: list[Tensor] = []
        self.held_out_tokens = 0
        self.tangents: Tangents | None = None
        self.fisher: Tensor | None = None  # E[d d^T], d: gradients of the log-likelihood by what the FFN puts out

    def add(self, hidden: Tensor) -> None:
        """Adds the hidden activations of training tokens.

        Args:
            hidden: tensor of shape (tokens, neurons), what goes into the out-projection.

        Raises:
            ValueError: if they are not finite.
        """
        hidden = hidden.float()
        if not bool(torch.isfinite(hidden).all()):
            raise ValueError("the hidden activations hold NaN or infinite values")
        self.product.addmm_(hidden.T, hidden)
        self.sum += hidden.sum(0)
        self.tokens += len(hidden)

    def hold_out(self, inputs: Tensor) -> None:
        """Keeps inputs of held-out tokens, as long as there is room.

        Args:
            inputs: tensor of shape (tokens, in_dim), what goes into the in-projections.

        Raises:
            ValueError: if they are not finite.
        """
        if not bool(torch.isfinite(inputs).all()):
            raise ValueError("the inputs hold NaN or infinite values")
        room = SAMPLE_TOKENS - self.held_out_tokens
        if room > 0:
            self._held_out.append(inputs[:room].detach().clone())
            self.held_out_tokens += len(self._held_out[-1])

    @property
    def second_moment(self) -> Tensor:
        """E[h h^T] over the training tokens, shape (neurons, neurons)."""
        return self.product / max(self.tokens, 1)

    @property
    def held_out(self) -> Tensor:
        """The sample of held-out inputs, shape (tokens, in_dim)."""
        return torch.cat(self._held_out) if self._held_out else self.product.new_zeros(0, self.in_dim)

    def cpu(self) -> FFNStatistics:
        """The same statistics in CPU memory."""
        self.product, self.sum = self.product.cpu(), self.sum.cpu()
        self._held_out = [inputs.cpu() for inputs in self._held_out]
        return self
