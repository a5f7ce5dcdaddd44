"""Means and covariances of narrow hidden activations and of the original's outputs: all that a refit depends on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .metric import in_metric
from .precision import exact_products


@dataclass(frozen=True)
class Moments:
    """Means and covariances of narrow hidden activations g and of the original's outputs y (without its bias).

    Args:
        gram: E[(g - E g) (g - E g)^T], shape (width, width).
        cross: E[(g - E g) (y - E y)^T], shape (width, out_dim).
        mean: E[g], shape (width,). None: `gram` and `cross` are second moments, what is to be explained where no bias
            takes the means.
        mean_out: E[y], shape (out_dim,), or None.
    """

    gram: Tensor
    cross: Tensor
    mean: Tensor | None
    mean_out: Tensor | None

    def in_metric(self, metric_root: Tensor | None) -> Moments:
        """The same with the outputs in the coordinates of a metric's root, a tensor of shape (out_dim, out_dim)."""
        mean_out = None if self.mean_out is None else in_metric(self.mean_out, metric_root)
        return Moments(self.gram, in_metric(self.cross, metric_root), self.mean, mean_out)

    def about_zero(self) -> Moments:
        """The second moments."""
        if self.mean is None or self.mean_out is None:
            return self
        gram, cross = torch.addr(self.gram, self.mean, self.mean), torch.addr(self.cross, self.mean, self.mean_out)
        return Moments(gram, cross, None, None)


class MomentSums:
    """Sums over tokens that moments are made of, about fixed shifts: the means of the first tokens.

    As in `FFNStatistics`, nothing is lost where an activation hardly varies about a large mean.

    Args:
        width: of the narrow hidden activations.
        out_dim: of the outputs.
        device: where to sum up.
        dtype: of the sums of products.
    """

    def __init__(
        self, width: int, out_dim: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.gram, self.cross = zeros(width, width, dtype=dtype), zeros(width, out_dim, dtype=dtype)
        self.shift, self.shift_out = zeros(width, dtype=dtype), zeros(out_dim, dtype=dtype)
        self.sum, self.sum_out = zeros(width), zeros(out_dim)
        self.tokens, self.total = 0, 0.0  # the sum of their weights

    def add(self, hidden: Tensor, outputs: Tensor, weights: Tensor | None = None) -> None:
        """Adds tokens.

        Args:
            hidden: tensor of shape (tokens, width).
            outputs: tensor of shape (tokens, out_dim), without the bias.
            weights: of the tokens, shape (tokens,), none negative; None: all 1.
        """
        if len(hidden) == 0:
            return
        if self.tokens == 0:
            self.shift = hidden.mean(0, dtype=torch.float64).to(self.shift)
            self.shift_out = outputs.mean(0, dtype=torch.float64).to(self.shift_out)
        g, y = (
            weighted((values - shift).to(self.gram), weights)
            for values, shift in ((hidden, self.shift), (outputs, self.shift_out))
        )
        with exact_products(self.gram.device):
            self.gram.addmm_(g.T, g)
            self.cross.addmm_(g.T, y)
        self.sum += weighted(g, weights).sum(0, dtype=torch.float64)
        self.sum_out += weighted(y, weights).sum(0, dtype=torch.float64)
        self.tokens += len(hidden)
        self.total += len(hidden) if weights is None else float(weights.sum(dtype=torch.float64))

    def reshift(self, mean: Tensor, mean_out: Tensor) -> None:
        """Moves the shifts, so that the sums of several ranks, all moved to the same ones, can be added up.

        `gram`, `cross`, `sum`, `sum_out`, `total` and `tokens` are then those of one rank with all tokens.

        Args:
            mean: tensor of shape (width,), near the mean of all tokens' hidden activations, the same on every rank.
            mean_out: tensor of shape (out_dim,), the same of the outputs.
        """
        shift, shift_out = mean.to(self.shift), mean_out.to(self.shift_out)
        change, change_out = shift.double() - self.shift, shift_out.double() - self.shift_out
        move_shift(self.gram, (self.sum, self.sum), (change, change), self.total)
        move_shift(self.cross, (self.sum, self.sum_out), (change, change_out), self.total)
        self.sum -= change * self.total
        self.sum_out -= change_out * self.total
        self.shift, self.shift_out = shift, shift_out

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """E[g] and E[y], float64."""
        count = self.total or 1.0
        return self.shift + self.sum / count, self.shift_out + self.sum_out / count

    def moments(self) -> Moments:
        """The moments of all tokens so far, in float64."""
        count = self.total or 1.0
        offset, offset_out = self.sum / count, self.sum_out / count
        gram = (self.gram.double() / count).addr_(offset, offset, alpha=-1)
        cross = (self.cross.double() / count).addr_(offset, offset_out, alpha=-1)
        return Moments(gram, cross, *self.means)


def weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """Values of tokens (tokens, n) times the roots of their weights (tokens,), so that products get the weights."""
    return values if weights is None else values * weights.to(values).sqrt().unsqueeze(1)


def move_shift(products: Tensor, sums: tuple[Tensor, Tensor], changes: tuple[Tensor, Tensor], total: float) -> None:
    """Moves the points about which products are summed, in place: sum (a - s) (b - t)^T for other s and t.

    Args:
        products: tensor of shape (m, n).
        sums: of a - s and of b - t, float64 tensors of shape (m,) and (n,).
        changes: of s and of t, float64 tensors of shape (m,) and (n,).
        total: the weights of the tokens that were summed up, together.
    """
    halfway = [(added - change * (total / 2)).to(products) for added, change in zip(sums, changes, strict=True)]
    left, right = (change.to(products) for change in changes)
    products.addr_(halfway[0], right, alpha=-1).addr_(left, halfway[1], alpha=-1)
