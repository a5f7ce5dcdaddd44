"""`FusionConfig`: what to fuse, how narrow, and by which method."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME, PeftType

from ..fusing.kernels import KERNELS
from ..fusing.methods import METHODS
from ..fusing.recipe import AUTO, REFITS, REPRESENTATIVES, SCALES
from .card import fill_card
from .config_checks import check_choice, check_integers, check_layers, check_widths

BASE_WEIGHTS = ("keep", "offload", "discard")
ALLOCATIONS = ("uniform", "fisher")
CHOICES = {
    "allocation": ALLOCATIONS,
    "method": tuple(METHODS),
    "kernel": (AUTO, *KERNELS),
    "representative": (AUTO, *REPRESENTATIVES),
    "refit": (AUTO, *REFITS),
    "scale": (AUTO, *SCALES),
    "base_weights": BASE_WEIGHTS,
}


@dataclass
class FusionConfig(PeftConfig):
    """Configuration of MLP Fusion: every chosen FFN becomes a narrower one made of clusters of its neurons.

    Args:
        ratio (`float`): Fraction of each FFN's neurons that is kept, in (0, 1].
        intermediate_size (`int`, *optional*): The width itself; wins over `ratio`.
        width_pattern (`dict[str, int | float]`): Regular expression of an FFN's name -> its width (`int`) or its
            ratio (`float`), as LoRA's `rank_pattern`; wins over both.
        allocation (`str`): "uniform" (every FFN keeps `ratio` of its neurons) or "fisher" (`ratio` is the average over
            the FFNs that `width_pattern` says nothing of; `calibrate` gives each the width at which a neuron is worth
            as much to the model's predictions as in any other, and leaves alone those that would keep all of theirs).
        multiple_of (`int`): A width that comes from a ratio is rounded up to a multiple of this.
        target_modules (`list[str] | str`, *optional*): The FFNs to fuse, by the name of the module that holds one
            or of all of its projections: a list of suffixes, or one regular expression. `None`: every FFN found.
        exclude_modules (`list[str] | str`, *optional*): FFNs to leave out, named in the same way.
        layers_to_transform (`list[int] | int`, *optional*): Only FFNs in these layers.
        layers_pattern (`list[str] | str`, *optional*): Name of the list of layers that `layers_to_transform`
            counts in, if it is not the first number in a module's path.
        modules_to_save (`list[str]`, *optional*): Further modules that are trained and saved in full.
        method (`str`): How the narrow FFN comes from the full one: "fusion", or what it is compared with:
            "clustering", "sketch", "mmd", "svd" and "pruning".
        kernel (`str`): What neurons are compared by: "weights" (the paper), "outputs", "fisher" (outputs, as far as
            the model's predictions depend on them) or "ntk", the last three after `calibrate`; "auto": "fisher" after
            `calibrate` ("outputs" for "pruning", and where a model has no gradients), else "weights".
        representative (`str`): What stands for a cluster: "centroid" (the paper) or "neuron" (one of its own);
            "auto": "neuron" after `calibrate`, else "centroid".
        refit (`str`): "ridge" (the out-projection is fitted anew to the original's outputs, after `calibrate`),
            "sequential" (then once more, layer after layer, to make up for what the narrow FFNs before it have changed;
            dense FFNs of models whose layers add what they put out) or "none"; "auto": "ridge" after `calibrate`.
        scale (`str`): The standalone, non-trainable scale of the hidden activations: "counts" (the sizes of the
            clusters, the paper's P), "ntk" (fitted to the original's tangent kernel, after `calibrate`) or "none";
            "auto": "ntk" after `calibrate`, else "counts" where there are clusters.
        keep_neurons (`int`): For "sketch": so many of the largest neurons are kept exactly.
        base_weights (`str`): What becomes of the original FFN weights: "keep", "offload" (to CPU memory, brought
            back for `disable_adapter`, `unload` and `unmerge_adapter`) or "discard" (least memory; what needs the
            original model then raises).
        n_init (`int`, *optional*): Restarts of the clustering; `None`: the engine's default.
        max_iter (`int`, *optional*): Iterations of the clustering; `None`: the engine's default.
        seed (`int`): Makes the clustering repeatable, on every rank the same.
        init_weights (`bool`): `False` gives random small FFNs, for tests.
        fused (`bool`): Written by `save_pretrained`, and a record only: that the adapter's file holds the narrow
            weights, which versions up to 0.1 loaded by it. Whether weights are loaded or made anew is told by the
            method that is called: a loaded configuration, used for a new adapter, fuses.
        fused_widths (`dict[str, list[int]]`, *optional*): Written when FFNs are fused: name -> [full, narrow].
        fused_by (`dict[str, str]`, *optional*): Written when FFNs are fused: what "auto" came to, and what the model
            was calibrated on.

    Raises:
        ValueError: naming the field that is wrong.
    """

    ratio: float = field(default=0.25, metadata={"help": "Fraction of each FFN's neurons that is kept, in (0, 1]."})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "The width of the narrow FFNs; wins over `ratio`."}
    )
    width_pattern: dict = field(
        default_factory=dict,
        metadata={"help": "Regular expression of an FFN's name -> its width (int) or ratio (float)."},
    )
    allocation: str = field(default="uniform", metadata={"help": f"How `ratio` is shared out: {ALLOCATIONS}."})
    multiple_of: int = field(
        default=8, metadata={"help": "A width that comes from a ratio is rounded up to a multiple of this."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "FFNs (or all projections of each) by suffix list or regex; None: every FFN found."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "FFNs to leave out, named as in `target_modules`."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Only FFNs in the layers with these indices."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers that `layers_to_transform` counts in."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Further modules that are trained and saved in full, a classifier say."},
    )
    method: str = field(default="fusion", metadata={"help": f"One of {CHOICES['method']}."})
    kernel: str = field(default="auto", metadata={"help": f"What neurons are compared by: {CHOICES['kernel']}."})
    representative: str = field(
        default="auto", metadata={"help": f"What stands for a cluster: {CHOICES['representative']}."}
    )
    refit: str = field(default="auto", metadata={"help": f"How the out-projection is fitted anew: {CHOICES['refit']}."})
    scale: str = field(
        default="auto", metadata={"help": f"The standalone scale of the hidden units: {CHOICES['scale']}."}
    )
    keep_neurons: int = field(default=0, metadata={"help": "For method 'sketch': neurons that are kept exactly."})
    base_weights: str = field(
        default="keep", metadata={"help": f"What becomes of the original FFN weights: {BASE_WEIGHTS}."}
    )
    n_init: int | None = field(default=None, metadata={"help": "Restarts of the clustering."})
    max_iter: int | None = field(default=None, metadata={"help": "Iterations of the clustering."})
    seed: int = field(default=0, metadata={"help": "Makes the clustering repeatable."})
    init_weights: bool = field(default=True, metadata={"help": "False: random small FFNs (for tests)."})
    fused: bool = field(default=False, metadata={"help": "Set in a saved adapter, as a record."})
    fused_widths: dict | None = field(
        default=None, metadata={"help": "Set when FFNs are fused: their names -> [full width, narrow width]."}
    )
    fused_by: dict | None = field(
        default=None, metadata={"help": "Set when FFNs are fused: what was used where a setting said 'auto'."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MLP_FUSION
        for name in ("target_modules", "exclude_modules"):
            if isinstance(names := getattr(self, name), (list, tuple, set)):
                setattr(self, name, sorted(names))
        if isinstance(self.layers_to_transform, (list, tuple, set, range)):
            self.layers_to_transform = list(self.layers_to_transform)
        check_widths(self)
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        check_integers(self)
        check_layers(self)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes `adapter_config.json`, marked as belonging to weights that are already fused.

        It is whole whenever the process is killed: it is written beside its place and renamed. The card that PEFT has
        put there is filled in.

        Args:
            save_directory: the folder to write to.
            kwargs: passed on to `PeftConfig.save_pretrained`.
        """
        os.makedirs(save_directory, exist_ok=True)
        fused, self.fused = self.fused, True
        try:
            with tempfile.TemporaryDirectory(dir=save_directory, prefix=".adapter-") as beside:
                super().save_pretrained(beside, **kwargs)
                os.replace(Path(beside, CONFIG_NAME), Path(save_directory, CONFIG_NAME))
            fill_card(Path(save_directory), self, self.fused_widths or {}, self.fused_by or {})
        finally:
            self.fused = fused
