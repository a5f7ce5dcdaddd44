"""The baseline "svd": every matrix of an FFN truncated to a low rank, at full width (paper, 5.1)."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_for(in_features: int, out_features: int, fraction: float) -> int:
    """The rank at which two factors hold at most a fraction of a matrix's numbers.

        rank = fraction * in * out // (in + out), at least 1; the full rank where nothing has to be saved

    Args:
        in_features: the matrix's columns.
        out_features: its rows.
        fraction: above 0, at most 1.

    Returns:
        The rank.
    """
    if fraction >= 1:
        return min(in_features, out_features)
    return max(1, int(fraction * in_features * out_features) // (in_features + out_features))


def rank_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix by a rank: W ~ (U S^.5) (S^.5 V^T).

    Args:
        matrix: tensor of shape (out_features, in_features), of any floating dtype.
        rank: at least 1, at most the smaller of the two.

    Returns:
        Tensors of shape (out_features, rank) and (rank, in_features), in float32 at least.

    Raises:
        ValueError: if `rank` is out of range.
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(
            f"The rank of a matrix of shape {tuple(matrix.shape)} is 1 to {min(matrix.shape)}, not {rank}."
        )
    u, s, v = torch.linalg.svd(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root.unsqueeze(1) * v[:rank]
