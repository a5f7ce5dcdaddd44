"""What PEFT sees of MLP Fusion, and makes known to it."""

from .compress import fuse
from .config import FusionConfig
from .layer import FusionLayer
from .loading import while_peft_loads, while_transformers_loads
from .mixed import MixedFusionModel
from .model import FusionModel
from .registration import register
from .transaction import while_added

register(
    FusionConfig,
    FusionModel,
    MixedFusionModel,
    FusionLayer,
    while_peft_loads,
    while_transformers_loads,
    while_added,
)

__all__ = ["FusionConfig", "FusionModel", "fuse"]
