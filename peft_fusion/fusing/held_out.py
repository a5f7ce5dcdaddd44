"""Held-out tokens: what any out-projection is judged on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import Moments, weighted


@dataclass(frozen=True)
class HeldOut:
    """Narrow hidden activations g and the original's outputs y (without its bias) on held-out tokens.

    Both are held about their means, so that little rounds off where activations have a large one.

    Args:
        hidden: (g - E g) of each token times the root of its share of the weight, shape (tokens, width).
        outputs: (y - E y) times the same, shape (tokens, out_dim).
        mean: E[g], float64 of shape (width,).
        mean_out: E[y], float64 of shape (out_dim,).
    """

    hidden: Tensor
    outputs: Tensor
    mean: Tensor
    mean_out: Tensor

    @classmethod
    def of(cls, hidden: Tensor, outputs: Tensor, weights: Tensor | None = None) -> HeldOut:
        """What is known of some tokens.

        Args:
            hidden: tensor of shape (tokens, width), of float32 at least; overwritten.
            outputs: tensor of shape (tokens, out_dim).
            weights: of the tokens, shape (tokens,), none negative; None: all 1.
        """
        shares = torch.ones(len(hidden), device=hidden.device) if weights is None else weights.to(hidden.device)
        shares = shares.double() / shares.sum(dtype=torch.float64).clamp(min=1e-30)
        mean, mean_out = (_mean(values, shares) for values in (hidden, outputs))
        hidden, outputs = hidden.sub_(mean.to(hidden)), outputs - mean_out.to(outputs)
        return cls(weighted(hidden, shares), weighted(outputs, shares), mean, mean_out)

    @property
    def size(self) -> float:
        """E|y|^2."""
        return float(self.outputs.square().sum(dtype=torch.float64) + self.mean_out.square().sum())

    def of_neurons(self, kept: Tensor) -> HeldOut:
        """The same of some of the neurons, given by an int64 tensor."""
        return HeldOut(self.hidden.index_select(1, kept), self.outputs, self.mean[kept], self.mean_out)

    def error(self, out_weight: Tensor, shift: Tensor | None = None) -> float:
        """E|out_weight^T g + shift - y|^2 / E|y|^2.

        Token by token: by moments it would be a difference of large numbers, and of a wide FFN take longer.

        Args:
            out_weight: tensor of shape (width, out_dim).
            shift: tensor of shape (out_dim,), or None.
        """
        missed = torch.addmm(self.outputs, self.hidden, out_weight.to(self.hidden), beta=-1).square_()
        apart = self.mean @ out_weight.double() - self.mean_out
        if shift is not None:
            apart = apart + shift.to(apart)
        return float(missed.sum(dtype=torch.float64) + apart.square().sum()) / max(self.size, 1e-30)

    def moments(self) -> Moments:
        """The moments of the tokens in float64, to fit to."""
        hidden, outputs = self.hidden.double(), self.outputs.double()
        return Moments(hidden.T @ hidden, hidden.T @ outputs, self.mean, self.mean_out)


def _mean(values: Tensor, shares: Tensor) -> Tensor:
    """A weighted mean over tokens, float64; what is summed up is how far they are from the first."""
    first = values[:1]
    return first.double().sum(0) + (shares.to(values) @ (values - first)).double()
