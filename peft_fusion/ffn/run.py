"""Runs an FFN outside its model, from its projections and its activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .find import FFN


def run_ffn(ffn: FFN, projections: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    """What an FFN with these projections puts out, without dropout.

    Args:
        ffn: for the layout and the activation.
        projections: one for each of the layout's, the out-projection last: the FFN's own, or narrow ones.
        x: tensor of shape (..., in_dim).

    Returns:
        Tensor of shape (..., out_dim).

    Raises:
        ValueError: if the layout does not say where the activation is.
    """
    *ins, out = projections
    pieces = [project(x) for project in ins]
    if ffn.layout.stacked:
        pieces = list(pieces[0].chunk(2, dim=-1))
    hidden = find_activation(ffn)(pieces[0])
    return out(hidden * pieces[1] if len(pieces) == 2 else hidden)


def find_activation(ffn: FFN) -> Callable[[Tensor], Tensor]:
    """An FFN's activation.

    Raises:
        ValueError: if the layout does not say where it is.
    """
    if ffn.activation is None:
        raise ValueError(
            f"The activation of the FFN {ffn.name!r} was not found at {ffn.layout.activations}. Register a layout "
            "that names it: `FFNLayout(..., activations=(...,))`."
        )
    return ffn.activation
