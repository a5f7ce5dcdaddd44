"""The tensors of a saved adapter: what there is, and of which shape, known before any of them is loaded."""

from __future__ import annotations

import inspect
import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

MARK = ".mlp_fusion_narrow."
PREFIX = "base_model.model."
SCALES = frozenset({"scale", "in_scale"})
FILES = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)


@dataclass(frozen=True)
class StoredTensors:
    """What an adapter's file or state dict holds.

    Args:
        origin: what it is called in messages.
        shapes: a tensor's name within the model, without an adapter's name -> its shape.
        prefix: what the names have in front of them where they are stored.
        mismatched_modules: whether modules of other shapes pass (PEFT leaves them out, `ignore_mismatched_sizes`).
    """

    origin: str
    shapes: Shapes
    prefix: str = ""
    mismatched_modules: bool = False

    def narrow(self) -> dict[str, Shapes]:
        """Of each projection that there are narrow tensors for: "weight", "bias", ... -> shape."""
        found: dict[str, Shapes] = {}
        for name, shape in self.shapes.items():
            projection, mark, kind = name.partition(MARK)
            if mark:
                found.setdefault(projection, {})[kind] = shape
        return found

    def check(self, needed: Mapping[str, tuple[int, ...]], any_shape: bool = False) -> None:
        """Refuses what lacks a tensor, or holds one of another shape.

        Args:
            needed: a tensor's name within the model -> the shape that it must have.
            any_shape: whether to let other shapes pass.

        Raises:
            ValueError: naming the tensor, what was found and what is needed.
        """
        for name, shape in needed.items():
            found = self.shapes.get(name)
            if found is None:
                raise ValueError(
                    f"{self.origin} lacks the tensor {self.prefix + name!r} of shape {shape}. It is damaged, or "
                    "belongs to another model."
                )
            if found != shape and not any_shape:
                raise ValueError(
                    f"{self.origin} holds {self.prefix + name!r} of shape {found}, but this model needs {shape}. "
                    "Load it on the model it was made for."
                )

    def check_narrow(self, needed: Mapping[str, Shapes]) -> None:
        """Refuses narrow tensors that are not exactly those that a model has a place for.

        Args:
            needed: a projection's name -> "weight", "bias", ... -> shape.

        Raises:
            ValueError: naming the tensor, what was found and what is needed.
        """
        names = {f"{projection}{MARK}{kind}": shape for projection, k in needed.items() for kind, shape in k.items()}
        self.check(names)
        for name in self.shapes:
            if MARK in name and name not in names:
                raise ValueError(
                    f"{self.origin} holds {self.prefix + name!r}, which this model has no place for; its fused "
                    f"projections are {sorted(needed)[:3]} ... Load it on the model it was made for."
                )


def in_state_dict(state_dict: Mapping[str, Any], rename: Callable[[str], str] = str) -> StoredTensors:
    """What a state dict holds, by names as `get_peft_model_state_dict` gives them.

    Args:
        state_dict: name -> tensor.
        rename: maps a name, without PEFT's prefix, to the one that the tensor is loaded under.
    """
    shapes = {name: tuple(value.shape) for name, value in state_dict.items() if isinstance(value, Tensor)}
    return _named("The state dict", shapes, rename)


def in_file(file: str, rename: Callable[[str], str] = str) -> StoredTensors:
    """What an adapter's file holds; only its header is read.

    Args:
        file: a safetensors file, or one that `torch.save` wrote.
        rename: maps a name in the file, without PEFT's prefix, to the one that it is loaded under.

    Raises:
        ValueError: if the file is damaged.
    """
    origin = f"The adapter file {file}"
    with open(file, "rb") as opened:
        zipped = opened.read(4) == b"PK\x03\x04"
    try:
        return _named(origin, _header(file, zipped), rename)
    except (SafetensorError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{origin} is damaged or incomplete ({reason}). Copy it again.") from error


def adapter_file(model_id: str | os.PathLike, options: Mapping[str, Any], files: Sequence[str] = FILES) -> str:
    """The path of an adapter's weights, found as PEFT and transformers find them.

    Args:
        model_id: a folder, or the name of a repository on the Hub.
        options: what the loading passes on to the Hub (revision, token, subfolder, ...); others are left out.
        files: the file names to look for, in this order.

    Raises:
        ValueError: if there is no such file.
    """
    folder = os.path.join(model_id, options.get("subfolder") or "")
    for name in files:
        if os.path.isfile(path := os.path.join(folder, name)):
            return path
    passed = {key: value for key, value in options.items() if key in inspect.signature(hf_hub_download).parameters}
    passed.setdefault("token", options.get("use_auth_token"))
    missing = ""
    for name in () if os.path.isdir(model_id) else files:
        try:
            return str(hf_hub_download(str(model_id), name, **passed))
        except EntryNotFoundError as error:
            missing = f" ({error})"
    raise ValueError(f"{folder} has neither of the files that hold an adapter, {' and '.join(files)}{missing}.")


def renamed_by(mapping: Mapping[str, str] | None) -> Callable[[str], str]:
    """Renames as PEFT does with a `key_mapping`: the first pattern that is found in a name is replaced."""

    def rename(name: str) -> str:
        for pattern, replacement in (mapping or {}).items():
            new, count = re.subn(pattern, replacement, name)
            if count:
                return new
        return name

    return rename


def _named(origin: str, shapes: Mapping[str, tuple[int, ...]], rename: Callable[[str], str]) -> StoredTensors:
    prefix = PREFIX if any(name.startswith(PREFIX) for name in shapes) else ""
    bare = {name.removeprefix("_orig_mod.").removeprefix(prefix): shape for name, shape in shapes.items()}
    return StoredTensors(origin, {rename(name): shape for name, shape in bare.items()}, prefix)


def _header(file: str, zipped: bool) -> Shapes:
    """The shape of every tensor in a file; only a zipped one of `torch.save` can be looked into without reading it."""
    if os.path.basename(file) == SAFETENSORS_WEIGHTS_NAME:
        with safe_open(file, framework="pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    loaded = torch.load(file, map_location="meta", weights_only=True, mmap=zipped)
    return {key: tuple(value.shape) for key, value in loaded.items() if isinstance(value, Tensor)}
