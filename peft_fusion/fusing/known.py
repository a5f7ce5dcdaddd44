"""An FFN together with what calibration found out about it, as everything that uses it needs it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .activations import Activation, look_by_parts
from .metric import in_metric, metric_root
from .statistics import FFNStatistics
from .weights import FFNWeights, cast


@dataclass(frozen=True)
class KnownFFN:
    """An FFN and what calibration found out about it.

    Args:
        weights: in float32 at least.
        statistics: of what goes through it.
        activation: its activation function.
        homogeneity: for a plain FFN, its activation's degree of homogeneity; None if it has none.
        second_moment: E[h h^T], shape (neurons, neurons).
        inputs: of held-out tokens, shape (tokens, in_dim).
        hidden: the hidden activations there, shape (tokens, neurons).
        metric_root: of the metric in which outputs are compared; None: the plain one.
    """

    weights: FFNWeights
    statistics: FFNStatistics
    activation: Activation
    homogeneity: int | None
    second_moment: Tensor
    inputs: Tensor
    hidden: Tensor
    metric_root: Tensor | None

    @cached_property
    def seen_weight(self) -> Tensor:
        """The out-weights in the coordinates of the metric, in which their lengths count."""
        return in_metric(self.weights.out_weight, self.metric_root)

    @cached_property
    def seen_outputs(self) -> Tensor:
        """What the FFN puts out on the held-out inputs, without its bias, in the same coordinates."""
        return self.hidden @ self.seen_weight

    @property
    def saliency(self) -> Tensor:
        """E[h_i^2] |w2_i|^2, the size of what each neuron puts out."""
        return self.second_moment.diagonal() * self.seen_weight.square().sum(1)


def known_ffn(
    weights: FFNWeights,
    statistics: FFNStatistics,
    activation: Activation,
    homogeneity: int | None = None,
    with_metric: bool = False,
) -> KnownFFN:
    """Brings everything together in float32 on the device of the weights.

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
    weights = cast(weights, torch.promote_types(weights.out_weight.dtype, torch.float32))
    root = None
    if with_metric and statistics.fisher is not None:
        root = metric_root(statistics.fisher.to(weights.out_weight))
    moment = statistics.second_moment.to(weights.out_weight.device)
    inputs = statistics.held_out.to(weights.out_weight)
    hidden = torch.cat([inside.hidden for inside in look_by_parts(weights, activation, inputs)])
    return KnownFFN(weights, statistics, activation, homogeneity, moment, inputs, hidden, root)
