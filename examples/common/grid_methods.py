"""The rows of compare_methods.py: how each method comes to its narrow model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """How a row comes about.

    Args:
        settings: of the `FusionConfig`; None: no fusion.
        calibrated: whether `calibrate` sees the training inputs first.
        tuned: the objective of `tune_layers`, which follows on the training inputs; "" for none.
        trains: "ffns" (FFNs and head, as a fused model by itself) or "attention" (these and the attention); without
            settings "all" or "lora".
    """

    settings: dict[str, Any] | None = field(default_factory=dict)
    calibrated: bool = False
    tuned: str = ""
    trains: str = "ffns"


PRUNING = {"method": "pruning"}
METHODS = {
    "full": Method(None, trains="all"),
    "full, FFNs and head": Method(PRUNING),
    "LoRA": Method(None, trains="lora"),
    "random narrow FFNs": Method({"init_weights": False}),
    "fusion": Method(),
    "clustering": Method({"method": "clustering"}),
    "sketch": Method({"method": "sketch"}),
    "mmd": Method({"method": "mmd"}),
    "svd": Method({"method": "svd"}),
    "pruning": Method(PRUNING),
    "fusion, tuned": Method(tuned="hidden_states"),
    "calibrated: pruning, no refit, no scale": Method({**PRUNING, "refit": "none", "scale": "none"}, True),
    "calibrated: pruning, no scale": Method({**PRUNING, "scale": "none"}, True),
    "calibrated: pruning": Method(PRUNING, True),
    "calibrated: pruning, tuned": Method(PRUNING, True, "hidden_states"),
    "calibrated: fusion of centroids": Method({"representative": "centroid"}, True),
    "calibrated: fusion, no scale": Method({"scale": "none"}, True),
    "calibrated: fusion": Method({}, True),
    "calibrated: fusion, budget": Method({"allocation": "fisher"}, True),
    "calibrated: fusion, budget, sequential": Method({"allocation": "fisher", "refit": "sequential"}, True),
    "calibrated: fusion, tuned": Method({}, True, "hidden_states"),
    "calibrated: pruning, FFNs tuned": Method(PRUNING, True, "ffn"),
    "calibrated: fusion, FFNs tuned": Method({}, True, "ffn"),
    "calibrated: pruning, attention trains": Method(PRUNING, True, trains="attention"),
    "calibrated: fusion, attention trains": Method({}, True, trains="attention"),
    "calibrated: pruning, FFNs tuned, attention trains": Method(PRUNING, True, "ffn", "attention"),
    "calibrated: fusion, FFNs tuned, attention trains": Method({}, True, "ffn", "attention"),
}
# Rows without a width: run once, as ratio 1, where nothing is left to prune
FULL_WIDTH = ("full", "full, FFNs and head", "LoRA")
