"""The metric in which an FFN's outputs are compared: the Fisher information of what it puts out.

With d the gradient of the model's log-likelihood by what the FFN puts out, F = E[d d^T] is the Fisher information of
that output: the squared length <e, F e> of an error e is, to second order, twice the change of the model's predictions
(Kullback-Leibler divergence). What the layers above do not look at costs nothing there.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLATTENING = 0.1
"""How much of the identity is added to the Fisher information, relative to its mean eigenvalue: it is an estimate."""


def metric(fisher: Tensor) -> Tensor:
    """The metric M in which outputs are compared, <y, M y>: the Fisher information at a common size, flattened.

    Args:
        fisher: E[d d^T], tensor of shape (out_dim, out_dim), of any scale.

    Returns:
        Tensor of the same shape and device in float64, of mean eigenvalue 1 + `FLATTENING`.
    """
    scaled = fisher.double() / fisher.diagonal().mean().clamp(min=1e-30)
    scaled.diagonal().add_(FLATTENING)
    return scaled


def metric_root(fisher: Tensor) -> Tensor:
    """A root R of the metric: <y, M y> = |y^T R|^2, the lower triangle that Cholesky's decomposition gives.

    The symmetric root, which measures the same, takes thirty times as long.

    Args:
        fisher: E[d d^T], tensor of shape (out_dim, out_dim), of any scale.

    Returns:
        Tensor of the same shape, dtype and device.
    """
    root: Tensor = torch.linalg.cholesky(metric(fisher)).to(fisher.dtype)
    return root


def in_metric(weight: Tensor, root: Tensor | None) -> Tensor:
    """Out-weights or a bias (..., out_dim) in the coordinates of a metric's root (out_dim, out_dim); None: as it is.

    Turning the weights is much cheaper than turning what they put out for every token.
    """
    return weight if root is None else weight @ root.to(weight)


def out_of_metric(weight: Tensor, root: Tensor | None) -> Tensor:
    """The inverse of `in_metric`."""
    if root is None:
        return weight
    rows = weight.double().reshape(-1, len(root))
    turned: Tensor = torch.linalg.solve_triangular(root.double(), rows, upper=False, left=False)
    return turned.reshape(weight.shape).to(weight)
