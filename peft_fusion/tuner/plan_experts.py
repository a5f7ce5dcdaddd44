"""What an adapter does to the routed experts of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..ffn import ConfigWidth, Experts, check_experts
from .config import FusionConfig

ANY_GATE = ("fusion", "pruning")
"""Methods that make no use of an FFN's being linear in its second piece."""


@dataclass(frozen=True)
class PlannedExperts:
    """The routed experts of a layer, the width they are all to have, and where the model's config states that width."""

    ffn: Experts
    width: int
    config_width: ConfigWidth

    def shapes(
        self, low_rank: bool, scale: str, ranks: Mapping[str, int] | None = None
    ) -> dict[str, dict[str, tuple[int, ...]]]:
        """The tensors of these experts in an adapter: their name -> a parameter's, "scale", ... -> shape.

        Args:
            low_rank: as for `PlannedFFN.shapes`; experts have no low ranks, and are as wide as it says.
            scale: the recipe's.
            ranks: not used.
        """
        layout, count = self.ffn.layout, self.ffn.count
        shapes = layout.shapes(count, self.ffn.in_dim, self.width, self.ffn.out_dim)
        if scale in ("counts", "ntk"):
            shapes["scale"] = (count, self.width)
        if scale == "ntk":
            shapes["in_scale"] = (count, layout.outputs(self.width))
        return {self.ffn.name: shapes}


def check_can_fuse_experts(chosen: Iterable[Experts], config: FusionConfig, low_rank: bool) -> None:
    """Refuses experts whose code is not known, and methods that they cannot be fused by.

    Args:
        chosen: those that are to be fused.
        config: the adapter's configuration.
        low_rank: whether it lowers ranks and leaves widths.

    Raises:
        ValueError: naming the first such experts, and what to do.
    """
    chosen = list(chosen)
    check_experts(chosen)
    for experts in chosen:
        if low_rank:
            raise ValueError(
                f'`method="{config.method}"` lowers the ranks of projections that are modules of their own, and those '
                f"of the experts {experts.name!r} are not. Leave them out with `exclude_modules`, or choose another "
                "method."
            )
        if experts.homogeneity == 0 and config.method not in ANY_GATE:
            raise ValueError(
                f'`method="{config.method}"` takes what gated FFNs put out for linear in their second piece, which is '
                f"not so in the experts {experts.name!r} ({type(experts.module).__name__}). Choose "
                f"{' or '.join(ANY_GATE)}, or leave them out with `exclude_modules`."
            )
