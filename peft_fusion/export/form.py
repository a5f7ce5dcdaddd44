"""What a checkpoint consists of beside its weights: what its config says, and the file that builds the model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..ffn import StatedWidths, find_all, on_meta, stock_config
from .folder import CONFIG
from .modelling import FILE, auto_classes, auto_map, build_from, modelling_file, narrow_name


@dataclass(frozen=True)
class CheckpointForm:
    """What the checkpoint of a model consists of beside its weights.

    Args:
        stated: how it states its widths.
        config: what it says for all layers.
        text: its modelling file; "" where the stock class builds the model.
        autos: auto class -> class of that file.
        loaded_by: the class of transformers that loads it.
    """

    stated: StatedWidths
    config: Any
    text: str
    autos: dict[str, str]
    loaded_by: str

    @classmethod
    def of(cls, host: Any, stated: StatedWidths) -> CheckpointForm:
        """The form that a model's checkpoint takes."""
        config = stock_config(host)
        stated.apply(config)
        kinds = auto_classes(stated.stock, config.model_type)
        text, autos = "", {}
        if stated.lists:
            base, prefix = type(on_meta(stated.stock, config).base_model), stated.stock.base_model_prefix
            text = modelling_file(stated, base, prefix)
            autos = auto_map(stated, base, prefix, config.model_type)
            kinds = [kind for kind in kinds if kind in autos]
            if not kinds:
                raise ValueError(
                    f"None of transformers' auto classes loads {stated.stock.__name__}, and a model whose FFNs differ "
                    "in width is loaded by no other. Fuse all FFNs to one width, or keep the adapter."
                )
        return cls(stated, config, text, autos, kinds[0] if kinds else stated.stock.__name__)

    @property
    def needs_code(self) -> bool:
        """Whether a modelling file belongs to it."""
        return bool(self.text)

    def check(self, widths: Mapping[str, int]) -> None:
        """Builds what the checkpoint will be loaded as, without weights, and compares widths.

        Raises:
            ValueError: if an FFN comes out with another width.
        """
        if self.text:
            config = type(self.config).from_dict(self.states(self.config.to_dict()))
            built = build_from(self.text, narrow_name(self.stated.stock), config)
        else:
            built = on_meta(self.stated.stock, self.config)
        for ffn in find_all(built):
            if ffn.width != widths.get(ffn.name, ffn.width):
                raise ValueError(
                    f"{self.stated.stock.__name__} gives the FFN {ffn.name!r} {ffn.width} neurons whatever its config "
                    f"says, but it has {widths[ffn.name]} now. Keep the adapter, or leave this FFN out."
                )

    def states(self, config: dict[str, Any]) -> dict[str, Any]:
        """A config as JSON, with what the modelling file needs."""
        config = self.stated.by_layer(config)
        if not self.text:
            return config
        return {**config, "architectures": [narrow_name(self.stated.stock)], "auto_map": self.autos}

    def write(self, merged: Any, folder: Path, max_shard_size: str | int) -> None:
        """Writes weights, configs and, where there is one, the modelling file."""
        self.stated.apply(merged.config)
        # A class of another name is loaded under the names that its own modules have, not those of old checkpoints.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")  # names a wrong size
            merged.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=not self.text)
        path = folder / CONFIG
        told = self.states(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        if self.text:
            (folder / FILE).write_text(self.text, encoding="utf-8")
