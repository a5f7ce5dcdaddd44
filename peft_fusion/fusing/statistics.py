"""What calibration remembers of an FFN: products and a bounded sample, never all activations."""

from __future__ import annotations

import torch
from torch import Tensor

from .cluster.gram import add_products, mirror
from .moments import move_shift, weighted
from .precision import exact_products

SAMPLE_TOKENS = 2048
"""Held-out tokens whose inputs are kept, in the model's dtype: 4.7 MB an FFN at 576 dimensions in float32."""


class FFNStatistics:
    """Mean and covariance of an FFN's hidden activations, a sample of its inputs, and what gradients told of it.

    What is summed up are activations less a fixed shift, the mean of the first tokens: with d = h - shift

        mean = shift + E[d]        covariance = E[d d^T] - E[d] E[d]^T

    lose nothing where a neuron hardly varies about a large mean, as E[h h^T] - E[h] E[h]^T does. Means over tokens are
    weighted where tokens have weights: the squares of what a router multiplies an expert's outputs by.

    Memory: 4 * neurons ** 2 bytes for the products, `SAMPLE_TOKENS` inputs, and once it is set the `fisher`
    information, 4 * out_dim ** 2 bytes.

    Args:
        width: the FFN's neurons.
        in_dim: the dimension of its inputs.
        device: where to accumulate.
        room: held-out tokens whose inputs are kept.
        weighted: whether tokens have weights, which are always given then.
    """

    def __init__(
        self,
        width: int,
        in_dim: int,
        device: torch.device | str = "cpu",
        room: int = SAMPLE_TOKENS,
        weighted: bool = False,
    ) -> None:
        self._product, self._mirrored = torch.zeros(width, width, device=device), True
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)  # sum of d
        self.shift = torch.zeros(width, device=device)
        self.tokens, self.total = 0, 0.0  # the sum of their weights
        self.width, self.in_dim = width, in_dim
        self._held_out: list[Tensor] = []
        self._held_out_weights = [torch.zeros(0, device=device)] if weighted else []
        self._room = room
        self.held_out_tokens = 0
        self.fisher: Tensor | None = None  # E[d d^T], d: gradients of the log-likelihood by what the FFN puts out

    def add(self, hidden: Tensor, weights: Tensor | None = None) -> None:
        """Adds the hidden activations of training tokens.

        Args:
            hidden: tensor of shape (tokens, neurons), what goes into the out-projection.
            weights: of the tokens, shape (tokens,), none negative; None: all 1.
        """
        if len(hidden) == 0:
            return
        if self.tokens == 0:
            self.shift = hidden.mean(0, dtype=torch.float64).to(self.shift)
        shifted = (hidden - self.shift).float()  # of half precision and float32: float32
        rooted = weighted(shifted, weights)
        with exact_products(self._product.device):
            add_products(self._product, rooted.T)
        self._mirrored = False
        self.sum += weighted(rooted, weights).sum(0, dtype=torch.float64)
        self.tokens += len(hidden)
        self.total += len(hidden) if weights is None else float(weights.sum(dtype=torch.float64))

    def hold_out(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Keeps inputs of held-out tokens, as long as there is room.

        Args:
            inputs: tensor of shape (tokens, in_dim), what goes into the in-projections.
            weights: of the tokens, shape (tokens,), none negative; None: all 1.
        """
        room = self._room - self.held_out_tokens
        if room > 0:
            self._held_out.append(inputs[:room].detach().clone())
            self.held_out_tokens += len(self._held_out[-1])
            if weights is not None:
                self._held_out_weights.append(weights[:room].detach().float())

    def replace_held_out(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Takes inputs (tokens, in_dim), those of several ranks say, for all that were held out."""
        self._held_out, self.held_out_tokens = [inputs], len(inputs)
        self._held_out_weights = [] if weights is None else [weights]

    def reshift(self, mean: Tensor) -> None:
        """Moves the shift, so that the sums of several ranks, all moved to the same one, can be added up.

        `product`, `sum`, `total` and `tokens` are then those that one rank would have with all of the tokens.

        Args:
            mean: tensor of shape (neurons,), near the mean of all tokens, the same on every rank.
        """
        shift = mean.to(self.shift)
        change = shift.double() - self.shift
        move_shift(self.product, (self.sum, self.sum), (change, change), self.total)
        self.sum -= change * self.total
        self.shift = shift

    @property
    def product(self) -> Tensor:
        """The sum of d d^T, float32 of shape (neurons, neurons)."""
        if not self._mirrored:  # sums are of one triangle
            mirror(self._product)
            self._mirrored = True
        return self._product

    @product.setter
    def product(self, product: Tensor) -> None:
        self._product, self._mirrored = product, True

    @property
    def mean(self) -> Tensor:
        """E[h] over the training tokens, float64 of shape (neurons,)."""
        return self.shift.double() + self._offset

    @property
    def covariance(self) -> Tensor:
        """E[(h - E h) (h - E h)^T] over the training tokens, float32 of shape (neurons, neurons); a new tensor."""
        offset = self._offset.float()
        return self.product.div(self.total or 1.0).addr_(offset, offset, alpha=-1)

    @property
    def second_moment(self) -> Tensor:
        """E[h h^T] over the training tokens, of the same shape; a new tensor, and nothing else of its size is made."""
        mean = self.mean.float()
        return self.covariance.addr_(mean, mean)

    @property
    def power(self) -> Tensor:
        """E[h_i^2] of every neuron over the training tokens, float64 of shape (neurons,)."""
        variance = self.product.diagonal().double() / (self.total or 1.0) - self._offset.square()
        return variance.clamp(min=0) + self.mean.square()

    def covariance_rows(self, neurons: Tensor) -> Tensor:
        """Rows of the covariance, shape (len(neurons), neurons), without making all of it."""
        offset = self._offset.float()
        rows = self.product.index_select(0, neurons) / (self.total or 1.0)
        return rows.addr_(offset[neurons], offset, alpha=-1)

    @property
    def _offset(self) -> Tensor:
        """The mean's distance from the shift, float64."""
        return self.sum / (self.total or 1.0)

    @property
    def held_out(self) -> Tensor:
        """The sample of held-out inputs, shape (tokens, in_dim)."""
        if not self._held_out:
            return self.product.new_zeros(0, self.in_dim)
        if len(self._held_out) > 1:  # once, so that there are not two copies of them
            self._held_out = [torch.cat(self._held_out)]
        return self._held_out[0]

    @property
    def held_out_weights(self) -> Tensor | None:
        """The weights of the held-out tokens, shape (tokens,); None where all count alike."""
        return torch.cat(self._held_out_weights) if self._held_out_weights else None

    def cpu(self) -> FFNStatistics:
        """The same statistics in CPU memory."""
        self.product, self.sum, self.shift = self.product.cpu(), self.sum.cpu(), self.shift.cpu()
        self._held_out = [inputs.cpu() for inputs in self._held_out]
        self._held_out_weights = [weights.cpu() for weights in self._held_out_weights]
        return self
