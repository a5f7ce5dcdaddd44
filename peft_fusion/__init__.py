"""NTK-approximating MLP Fusion as a PEFT method."""

from .registration import add_peft_type, register

add_peft_type()  # before `config` needs the member

from .config import FusionConfig  # noqa: E402
from .model import FusionModel, fuse  # noqa: E402

register()

__all__ = ["FusionConfig", "FusionModel", "fuse"]
