"""What `export` leaves: a folder with weights, configs, tokenizer and card, that was loaded and compared."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel

from ..ffn import find_all, parameters_of, state_widths
from ..observe.batches import Batch
from ..tuner.config import FusionConfig
from .card import Made, card
from .check import check_reload, tolerance
from .folder import written_whole
from .form import CheckpointForm


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Args:
        directory: where.
        loaded_by: the class of transformers that loads it.
        needs_code: whether that takes `trust_remote_code=True`, for widths differ.
        widths: name of every FFN that adapters narrowed -> its neurons before and now.
        parameters: before and now.
        size: bytes of its weights.
        difference: by how much its outputs differ from the fused model's, of their norm; None if not checked.
        repository: its id on the Hub; None if it was not uploaded.
    """

    directory: str
    loaded_by: str
    needs_code: bool
    widths: dict[str, tuple[int, int]]
    parameters: tuple[int, int]
    size: int
    difference: float | None
    repository: str | None = None


def checked_form(host: Any, widths: Mapping[str, int]) -> CheckpointForm:
    """The form that a model's checkpoint takes once its FFNs have these widths.

    Raises:
        ValueError: if no checkpoint can state them.
    """
    form = CheckpointForm.of(host, state_widths(host, widths))
    form.check(widths)
    return form


def made_of(
    host: Any,
    merged: PreTrainedModel,
    form: CheckpointForm,
    widths: Mapping[str, tuple[int, int]],
    adapters: list[PeftConfig],
    tokenizer: bool,
    fidelity: str,
) -> Made:
    """What there is to tell of a model.

    Args:
        host: the original, with its adapters if it has any.
        merged: what is written.
        form: of the checkpoint.
        widths: FFN name -> its neurons before and now.
        adapters: the configurations by which it was made.
        tokenizer: whether one is written.
        fidelity: figures, as text.
    """
    now = sum(parameter.numel() for parameter in merged.parameters())
    narrowed = [(ffn, widths[ffn.name][1]) for ffn in find_all(host)]
    grown = sum(parameters_of(ffn) - parameters_of(ffn, width) for ffn, width in narrowed)
    origin = str(getattr(host.config, "_name_or_path", "") or "")
    local = os.path.exists(origin)  # where it lies on this machine is of no use elsewhere, and no one's business
    return Made(
        base=Path(origin).name if local else origin,
        on_hub=bool(origin) and not local,
        kind=form.loaded_by,
        mixed=form.needs_code,
        widths={name: both for name, both in widths.items() if both[0] != both[1]},
        parameters=(now + grown, now),
        configs=[config for config in adapters if isinstance(config, FusionConfig)],
        others=sorted(str(config.peft_type.value) for config in adapters if not isinstance(config, FusionConfig)),
        tokenizer=tokenizer,
        fidelity=fidelity,
    )


def write_checked(
    target: Path,
    form: CheckpointForm,
    merged: PreTrainedModel,
    made: Made,
    tokenizer: Any,
    max_shard_size: str | int,
    place: str,
    batch: Batch | None,
    expected: Tensor | None,
) -> Exported:
    """Writes the folder, whole or not at all.

    Args:
        target: where to.
        form: of the checkpoint.
        merged: the plain model.
        made: what there is to tell of it.
        tokenizer: what is written beside it, or None.
        max_shard_size: of one file of weights.
        place: where the card says that it is loaded from.
        batch: inputs to compare outputs on, or None.
        expected: what they come to.

    Raises:
        RuntimeError: if what was written does not load, or computes something else; nothing is left of it then.
    """
    difference = None
    with written_whole(target) as folder:
        form.write(merged, folder, max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card(made, target.name, place), encoding="utf-8")
        if batch is not None and expected is not None:
            on_disk = any(parameter.is_meta for parameter in merged.parameters())
            difference = check_reload(folder, form.loaded_by, batch, expected, tolerance(merged), on_disk)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Exported(str(target), form.loaded_by, form.needs_code, dict(made.widths), made.parameters, size, difference)
