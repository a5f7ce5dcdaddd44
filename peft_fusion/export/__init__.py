"""`export`: a merged model as a checkpoint that loads where transformers loads, checked before it is there.

widths -> can a checkpoint state them? -> a plain copy around the same tensors -> a folder beside the place
-> loaded in a fresh process and compared -> renamed to its place
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer

from ..observe.batches import Batch
from ..observe.unwrap import unwrapped
from .check import outputs_to_match, random_batch
from .folder import check_free
from .fused import export_fused, fused_by_itself
from .hub import check_upload, upload
from .merged import active_configs, check_mergeable, merged_copy, merged_widths
from .written import Exported, checked_form, made_of, write_checked

__all__ = ["Exported", "export", "export_fused", "fused_by_itself"]


def export(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    tokenizer: Any = None,
    fidelity: object = "",
    check: bool | Batch = True,
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
    push_to_hub: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> Exported:
    """Writes a model with its adapters merged as a plain transformers checkpoint: weights, configs, tokenizer, card.

    Where all FFNs have one width, stock transformers loads it. Where widths differ the config states them layer by
    layer and a short modelling file comes with it, so that `trust_remote_code=True` loads it. Whether the family's
    layers can be built that way is found out before any work.

    All active adapters are merged, LoRA beside fusion included. The model is not changed, and no weight is copied that
    merging does not change: beyond the model it takes the narrow FFNs, and what lies beneath other adapters.

    The folder is written beside its place and renamed once it is whole and checked, so that an error or a kill leaves
    what was there before. (Between the two renames that replace an old folder, a kill leaves both whole beside the
    place; the next call puts the old one back.)

    Args:
        model: a `PeftModel`, a transformers model with adapters, or a plain one (merged, or from `fuse`), wrapped or
            not; in one process, not quantised.
        directory: where to; not there yet, or empty.
        tokenizer: what has a `save_pretrained` of its own: a tokenizer or processor. True: the tokenizer that lies
            with the model that this was made of, in files on this machine. None: none is written.
        fidelity: figures for the card: the report of `peft_fusion.fidelity`, or any text.
        check: whether to load the checkpoint in a fresh process, without this package and PEFT, and to compare outputs
            on random tokens, or on a batch if one is given. It takes the exported model's memory once more, on the CPU.
        overwrite: whether to replace a model that is there.
        max_shard_size: of one file of weights.
        push_to_hub: id of the repository that the folder is uploaded to as well, `me/small` say; made if need be.
        private: whether a new repository is.
        token: of the Hub; None: the one that is stored on this machine.
        commit_message: of the upload.

    Returns:
        What was written.

    Raises:
        ValueError: before any work, if the directory is taken, the model cannot be merged, no checkpoint can state its
            widths, there is no tokenizer, outputs cannot be compared, or nothing can be uploaded.
        OSError: before any work, if the Hub does not accept the token.
        RuntimeError: if what was written does not load, or computes something else; nothing is left of it then.
    """
    target, host = Path(os.path.abspath(directory)), unwrapped(model)
    check_mergeable(host)
    check_free(target, overwrite)
    if push_to_hub is not None:
        check_upload(push_to_hub, token)
    widths = merged_widths(host)
    form = checked_form(host, {name: now for name, (_, now) in widths.items()})
    tokenizer = _tokenizer_of(host) if tokenizer is True else tokenizer
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise ValueError(f"`tokenizer` must be a tokenizer, a processor, True or None, but got {tokenizer!r}.")
    batch = check if isinstance(check, Mapping) else random_batch(host) if check else None
    expected = None if batch is None else outputs_to_match(host, batch)
    merged = merged_copy(host)
    made = made_of(host, merged, form, widths, active_configs(host), tokenizer is not None, str(fidelity))
    written = write_checked(target, form, merged, made, tokenizer, max_shard_size, push_to_hub or ".", batch, expected)
    if push_to_hub is None:
        return written
    return replace(
        written, repository=upload(target, push_to_hub, private=private, token=token, message=commit_message)
    )


def _tokenizer_of(host: Any) -> Any:
    """The tokenizer that lies with the model that another was made of.

    Raises:
        ValueError: if there is none on this machine.
    """
    name = getattr(host.config, "_name_or_path", "")
    try:
        if name:
            return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no tokenizer in the files of {name!r} on this machine ({error}). Pass one: "
            "`tokenizer=AutoTokenizer.from_pretrained(...)`."
        ) from error
    raise ValueError("The model does not know where it was loaded from. Pass a tokenizer instead of `tokenizer=True`.")
