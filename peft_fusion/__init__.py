"""NTK-approximating MLP Fusion as a PEFT method."""

from .calibrate import calibrate
from .distill import distill, teacher
from .export import export
from .fidelity import fidelity
from .tune import tune_layers
from .tuner import FusionConfig, FusionModel, fuse

__all__ = [
    "FusionConfig",
    "FusionModel",
    "calibrate",
    "distill",
    "export",
    "fidelity",
    "fuse",
    "teacher",
    "tune_layers",
]
