"""NTK-approximating MLP Fusion as a PEFT method."""

from .tuner.registration import add_peft_type, register

add_peft_type()  # before `config` needs the member

from .calibrate import calibrate  # noqa: E402
from .fidelity import fidelity  # noqa: E402
from .tune import tune_layers  # noqa: E402
from .tuner.config import FusionConfig  # noqa: E402
from .tuner.model import FusionModel, fuse  # noqa: E402

register()

__all__ = ["FusionConfig", "FusionModel", "calibrate", "fidelity", "fuse", "tune_layers"]
