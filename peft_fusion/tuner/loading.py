"""What PEFT's and transformers' loading methods tell the tuner: that an adapter's tensors will follow, and which."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from .config import FusionConfig
from .state import check_fits, unfilled
from .stored import FILES, MARK, StoredTensors, adapter_file, in_file, in_state_dict, renamed_by
from .transaction import Snapshot

Given = Mapping[str, Any]
"""What a loading method was called with: name -> argument."""


@dataclass
class Loading:
    """A call that loads an adapter of whatever type; nothing is looked at until a fusion tuner asks for its tensors.

    Args:
        find: finds and reads what is stored.
    """

    find: Callable[[], StoredTensors]
    stored: StoredTensors | None = None
    target: tuple[nn.Module, str] | None = None
    before: Snapshot | None = None

    def tensors(self, model: nn.Module, adapter_name: str) -> StoredTensors:
        """What is stored of the adapter that is to be put in place in a model, or loaded into one.

        That is asked for before anything of the model changes, so that all of it can be put back.
        """
        self.stored = self.stored or self.find()
        self.target = (model, adapter_name)
        self.before = self.before or Snapshot(model)
        return self.stored

    def undo(self) -> None:
        """Puts back what the model was, if a fusion adapter was being loaded into it."""
        if self.before is not None and self.target is not None:
            model, adapter_name = self.target
            self.before.restore()
            if not any(adapter_name in getattr(m, "mlp_fusion_narrow", ()) for m in model.modules()):
                (getattr(model, "peft_config", None) or {}).pop(adapter_name, None)


_current: ContextVar[Loading | None] = ContextVar("mlp_fusion_loading", default=None)


def tensors_to_come(model: nn.Module, adapter_name: str) -> StoredTensors | None:
    """What is stored of the adapter that a loading method is putting in place; None where none is."""
    loading = _current.get()
    return None if loading is None else loading.tensors(model, adapter_name)


@contextmanager
def while_peft_loads(given: Given) -> Iterator[None]:
    """Around a call of PEFT's `from_pretrained` or `load_adapter`.

    Args:
        given: what it was called with.

    Raises:
        ValueError: if it is a fusion adapter and its file is damaged, does not fit, or did not fill all of it.
    """
    outer = _current.get()
    if outer is not None and outer.stored is not None:  # `from_pretrained`, whose adapter is in place by now
        yield
        return
    loading = Loading(lambda: _found_by_peft(given))
    model, adapter_name = given.get("self"), given["adapter_name"]
    existing = (getattr(model, "peft_config", None) or {}).get(adapter_name)
    if model is not None and isinstance(existing, FusionConfig):
        check_fits(model, adapter_name, loading.tensors(model, adapter_name), existing)
    with _entered(loading):
        yield


@contextmanager
def while_transformers_loads(given: Given) -> Iterator[None]:
    """Around a call of the `load_adapter` that transformers' models have; as `while_peft_loads`."""
    with _entered(Loading(lambda: _found_by_transformers(given))):
        yield


@contextmanager
def _entered(loading: Loading) -> Iterator[None]:
    token = _current.set(loading)
    try:
        yield
        if loading.target is not None and (name := unfilled(*loading.target)) is not None:
            raise ValueError(f"Nothing was loaded into {name!r} of the adapter {loading.target[1]!r}.")
    except BaseException:
        loading.undo()
        raise
    finally:
        _current.reset(token)


def _found_by_peft(given: Given) -> StoredTensors:
    """As `peft.load_peft_weights` does."""
    mapping = given.get("key_mapping")
    if mapping is None and "key_mapping" in given:
        mapping = getattr(given.get("model"), "_checkpoint_conversion_mapping", None)
    stored = in_file(adapter_file(given["model_id"], given), renamed_by(mapping))
    return replace(stored, mismatched_modules=bool(given.get("ignore_mismatched_sizes")))


def _found_by_transformers(given: Given) -> StoredTensors:
    """As `PeftAdapterMixin.load_adapter` does."""
    load_config = given.get("load_config")
    settings = {**(vars(load_config) if load_config else {}), **given}
    rename = _renamed_by_transformers(given["self"], settings.get("weight_mapping"))
    if given.get("adapter_state_dict") is not None:
        return in_state_dict(given["adapter_state_dict"], rename=rename)
    options = dict(settings.get("download_kwargs") or {})
    if given.get("peft_config") is None:
        options.update(given.get("adapter_kwargs") or {})
    model_id = given.get("peft_model_id") or settings["pretrained_model_name_or_path"]
    files = FILES[::-1] if settings.get("use_safetensors") is False else FILES
    return in_file(adapter_file(model_id, options, files), rename)


def _renamed_by_transformers(model: nn.Module, conversions: Any) -> Callable[[str], str]:
    """Renames what the model has no place for as transformers does, say where its modules were once named otherwise."""
    modules = {name for name, _ in model.named_modules()}
    known = copy.deepcopy(conversions or get_model_conversion_mapping(model))
    renamings = [conversion for conversion in known if isinstance(conversion, WeightRenaming)]

    def rename(name: str) -> str:
        module = name.partition(MARK)[0] if MARK in name else name.rpartition(".")[0]
        for renaming in renamings if module not in modules else ():
            name, _ = renaming.rename_source_key(name)
        return name

    return rename
