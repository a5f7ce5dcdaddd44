"""What two processes do together, and one alone does to compare."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from architectures import BY_NAME, Architecture
from helpers import half
from moes import MIXTRAL
from peft import get_peft_model
from torch import Tensor, nn

from peft_fusion import tune_layers


@dataclass(frozen=True)
class Case:
    """A calibration.

    Args:
        architecture: the tiny model's name.
        settings: of the configuration.
        data: whether it gets batches, or makes its own.
    """

    architecture: str
    settings: dict[str, Any] = field(default_factory=dict)
    data: bool = True


MODELS: dict[str, Architecture] = {**BY_NAME, "mixtral": MIXTRAL}
WITHOUT_DRAWS = {"kernel": "outputs", "scale": "none"}
CASES = {
    "no draws, llama": Case("llama", WITHOUT_DRAWS),
    "no draws, bert": Case("bert", WITHOUT_DRAWS),
    "no draws, t5": Case("t5_gated", WITHOUT_DRAWS),
    "no draws, mixtral": Case("mixtral", WITHOUT_DRAWS),
    "defaults, llama": Case("llama"),
    "defaults, bert": Case("bert"),
    "defaults, mixtral": Case("mixtral"),
    "centroids, bert": Case("bert", {"representative": "centroid", **WITHOUT_DRAWS}),
    "centroids, mixtral": Case("mixtral", {"representative": "centroid", **WITHOUT_DRAWS}),
    "sequential, llama": Case("llama", {"refit": "sequential", **WITHOUT_DRAWS}),
    "sequential, bert": Case("bert", {"refit": "sequential", **WITHOUT_DRAWS}),
    "own text, llama": Case("llama", {}, data=False),
}


def batches(architecture: Architecture, count: int = 8) -> list[dict[str, Tensor]]:
    """Batches of four, every fourth sequence of which is held out, on one rank as on two."""
    return [architecture.batch(seed=seed, size=4) for seed in range(count)]


def narrow_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items() if "mlp_fusion_narrow" in name}


def tuned(objective: str, data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The narrow weights of a Llama after some tuning."""
    llama = BY_NAME["llama"]
    model = get_peft_model(llama.make(), half(llama))
    before = narrow_state(model)
    with torch.random.fork_rng():
        settings: dict[str, Any] = {"steps": 20, "tokens": 200} if objective == "ffn" else {}
        tune_layers(model, data, objective=objective, learning_rate=0.03 if objective == "ffn" else 1e-3, **settings)
    after = narrow_state(model)
    assert not any(torch.equal(after[name], before[name]) for name in after if name.endswith("weight"))
    return after
