"""A narrow FFN in a hurry: it stands in for those still to be made, so that gradients pass through narrow FFNs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .metric import metric
from .neurons import most_salient
from .statistics import FFNStatistics
from .weights import FFNWeights

STRENGTH = 0.03
"""Of the ridge, relative to the variance of each hidden activation: the one that held-out tokens mostly choose."""


@dataclass(frozen=True)
class StandIn:
    """The most salient neurons of an FFN, with an out-projection that makes up for the others.

    Args:
        kept: int64 tensor of shape (width,): the neurons, in order.
        out_weight: tensor of shape (width, out_dim).
        out_bias: tensor of shape (out_dim,), or None.
    """

    kept: Tensor
    out_weight: Tensor
    out_bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        """What it puts out: maps the original's hidden activations (..., neurons) to (..., out_dim)."""
        out = hidden.index_select(-1, self.kept.to(hidden.device)) @ self.out_weight.to(hidden)
        return out if self.out_bias is None else out + self.out_bias.to(out)


def stand_in(weights: FFNWeights, width: int, statistics: FFNStatistics) -> StandIn:
    """Prunes an FFN by saliency and refits its out-projection, with one solve of a (width, width) system.

    The saliency is taken in the Fisher metric where calibration knows it, as the narrow FFN's own neurons will be.

    Args:
        weights: the FFN's weights.
        width: neurons to keep.
        statistics: what calibration found out about it.
    """
    w = weights.out_weight.float()
    moment, mean = statistics.second_moment.to(w.device), statistics.mean.to(w)
    seen = w if statistics.fisher is None else w @ metric(statistics.fisher.to(w.device)).to(w)
    kept = most_salient(moment.diagonal() * (seen * w).sum(1), width)
    covariance = (moment if weights.out_bias is None else statistics.covariance.to(w.device))[kept]  # it takes means
    own, cross, prior = covariance[:, kept], covariance @ w, w[kept]
    variance = own.diagonal()
    variance = torch.maximum(variance, 1e-12 * moment.diagonal()[kept] + 1e-30)
    unit = variance.sqrt().unsqueeze(1)
    matrix = own / (unit * unit.T) + STRENGTH * torch.eye(width, device=w.device)
    right = (cross + STRENGTH * variance.unsqueeze(1) * prior) / unit
    fitted = torch.cholesky_solve(right, torch.linalg.cholesky(matrix)) / unit
    if weights.out_bias is None:
        return StandIn(kept, fitted, None)
    return StandIn(kept, fitted, weights.out_bias.float() + mean @ w - mean[kept] @ fitted)
