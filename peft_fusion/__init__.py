"""NTK-approximating MLP Fusion as a PEFT method."""

from .calibrate import calibrate
from .export import export
from .fidelity import fidelity
from .tune import tune_layers
from .tuner import FusionConfig, FusionModel, fuse

__all__ = ["FusionConfig", "FusionModel", "calibrate", "export", "fidelity", "fuse", "tune_layers"]
