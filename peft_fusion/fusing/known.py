"""An FFN together with what calibration found out about it, as everything that uses it needs it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .activations import CHUNK, Activation, hidden_activations
from .held_out import HeldOut
from .metric import in_metric, metric_root
from .moments import Moments
from .statistics import FFNStatistics
from .weights import FFNWeights


@dataclass(frozen=True)
class KnownFFN:
    """An FFN and what calibration found out about it.

    What is as large as the square of its width is made anew each time, for there is room for few of these.

    Args:
        weights: the FFN's weights, of any dtype.
        statistics: of what goes through it.
        activation: its activation function.
        homogeneity: for a plain FFN, its activation's degree of homogeneity; None if it has none.
        inputs: of held-out tokens, shape (tokens, in_dim), on the device of the weights.
        metric_root: of the metric in which outputs are compared; None: the plain one.
        token_weights: of the held-out tokens, shape (tokens,); None: all 1.
    """

    weights: FFNWeights
    statistics: FFNStatistics
    activation: Activation
    homogeneity: int | None
    inputs: Tensor
    metric_root: Tensor | None
    token_weights: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The one to compute in: float32 at least."""
        return torch.promote_types(self.weights.out_weight.dtype, torch.float32)

    @cached_property
    def seen_weight(self) -> Tensor:
        """The out-weights in the coordinates of the metric, in which their lengths count."""
        return in_metric(self.weights.out_weight.to(self.dtype), self.metric_root)

    @cached_property
    def seen_outputs(self) -> Tensor:
        """What the FFN puts out on the held-out inputs, without its bias, in the same coordinates."""
        parts = (hidden_activations(self.weights, self.activation, part) for part in self.inputs.split(CHUNK))
        return torch.cat([hidden @ self.seen_weight for hidden in parts])

    @property
    def saliency(self) -> Tensor:
        """E[h_i^2] |w2_i|^2, the size of what each neuron puts out."""
        return self.statistics.power.to(self.seen_weight) * self.seen_weight.square().sum(1)

    def second_moment(self) -> Tensor:
        """E[h h^T], float32 of shape (neurons, neurons); a new tensor."""
        return self.statistics.second_moment.to(self.inputs.device)

    def moments_of_kept(self, kept: Tensor) -> Moments:
        """The moments of the FFN of which some neurons are kept: parts of what calibration accumulated.

        Args:
            kept: int64 tensor of the kept neurons.

        Returns:
            Float64, with the outputs in the metric's coordinates; about means if the FFN has an out-bias.
        """
        mean, w = self.statistics.mean.to(self.inputs.device), self.seen_weight
        gram, cross = mean.new_empty(len(kept), len(kept)), mean.new_empty(len(kept), w.shape[1])
        biased = self.weights.out_bias is not None
        for start in range(0, len(kept), CHUNK):
            part = slice(start, start + CHUNK)
            rows = self.statistics.covariance_rows(kept[part].to(self.statistics.sum.device)).to(w)
            if not biased:
                rows.addr_(mean[kept[part]].to(w), mean.to(w))
            gram[part] = rows[:, kept].double()
            cross[part] = (rows @ w).double()  # the rows are sums in float32, so no digit is lost
        return Moments(gram, cross, mean[kept] if biased else None, mean @ w.double() if biased else None)

    def held_out(self, narrow: FFNWeights, scale: Tensor | None = None, tokens: slice = slice(None)) -> HeldOut:
        """A narrow FFN on held-out tokens, with the original's outputs in the metric's coordinates.

        Args:
            narrow: the narrow FFN's weights.
            scale: of its hidden activations, tensor of shape (width,), or None for 1.
            tokens: which of the held-out tokens.
        """
        inputs, outputs = self.inputs[tokens], self.seen_outputs[tokens]
        hidden = torch.cat([hidden_activations(narrow, self.activation, x) for x in inputs.split(CHUNK)])
        hidden = hidden if scale is None else hidden * scale
        return HeldOut.of(hidden, outputs, None if self.token_weights is None else self.token_weights[tokens])


def known_ffn(
    weights: FFNWeights,
    statistics: FFNStatistics,
    activation: Activation,
    homogeneity: int | None = None,
    with_metric: bool = False,
) -> KnownFFN:
    """Brings an FFN and its statistics together on the device of the weights.

    Args:
        weights: the FFN's weights.
        statistics: what calibration found out about it.
        activation: its activation function.
        homogeneity: for a plain FFN, its activation's degree of homogeneity; None if it has none.
        with_metric: whether outputs are compared as far as the model's predictions depend on them.

    Raises:
        ValueError: if the statistics are of an FFN of another shape, or hold no gradients for the metric.
    """
    shape = (weights.width, weights.in_weights[0].shape[1])
    if shape != (statistics.width, statistics.in_dim):
        raise ValueError(
            f"The statistics are of an FFN of {statistics.width} neurons and {statistics.in_dim} inputs, but this one "
            f"has {shape[0]} and {shape[1]}. Calibrate again."
        )
    if with_metric and statistics.fisher is None:
        raise ValueError('The kernel "fisher" needs gradients, and these statistics have none.')
    device, root = weights.out_weight.device, None
    if with_metric and statistics.fisher is not None:
        dtype = torch.promote_types(weights.out_weight.dtype, torch.float32)
        root = metric_root(statistics.fisher.to(device, dtype))
    token_weights = statistics.held_out_weights
    if token_weights is not None:
        token_weights = token_weights.to(device)
    return KnownFFN(weights, statistics, activation, homogeneity, statistics.held_out.to(device), root, token_weights)
