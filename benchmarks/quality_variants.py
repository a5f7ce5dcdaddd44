"""The rows of quality.py: which layers are narrowed, and how."""

from __future__ import annotations

from typing import Any

LAYERS = {"last": list(range(14, 30)), "all": None}

# row -> (settings of the configuration, or None for no fusion; whether it is calibrated)
VARIANTS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "original": (None, False),
    "fusion as published": ({}, False),
    "clustering": ({"method": "clustering"}, False),
    "pruning by norms": ({"method": "pruning"}, False),
    "random narrow FFNs": ({"init_weights": False}, False),
    "pruning by saliency, no refit, no scale": ({"method": "pruning", "refit": "none", "scale": "none"}, True),
    "pruning by saliency, refit, no scale": ({"method": "pruning", "scale": "none"}, True),
    "pruning by saliency, refit": ({"method": "pruning"}, True),
    "fusion, centroids, refit": ({"representative": "centroid"}, True),
    "fusion, weight kernel, refit": ({"kernel": "weights"}, True),
    "pruning by saliency, fisher kernel, refit": ({"method": "pruning", "kernel": "fisher"}, True),
    "fusion, outputs kernel": ({"kernel": "outputs"}, True),
    "fusion, ntk kernel": ({"kernel": "ntk"}, True),
    "fusion": ({}, True),
    "fusion, sequential": ({"refit": "sequential"}, True),
    "fusion, budget": ({"allocation": "fisher"}, True),
    "fusion, budget, sequential": ({"allocation": "fisher", "refit": "sequential"}, True),
    "pruning by saliency, fisher kernel, refit, budget": (
        {"method": "pruning", "kernel": "fisher", "allocation": "fisher"},
        True,
    ),
    "pruning by saliency, fisher kernel, budget, sequential": (
        {"method": "pruning", "kernel": "fisher", "allocation": "fisher", "refit": "sequential"},
        True,
    ),
}
