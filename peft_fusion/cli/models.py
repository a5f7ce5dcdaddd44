"""Models, tokenizers and texts that a command line names."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

BATCH = 8
ADAPTER = "adapter_config.json"


def load_model(name: str, dtype: str = "auto", trust: bool = False, away: Path | None = None) -> Any:
    """A model by the class that its config names, head included, on the first GPU if there is one.

    Args:
        name: its Hub id or path.
        dtype: of its weights.
        trust: whether to run code that comes with it.
        away: a folder for weights that have to be stored anew, if all are to stay on disk until they are needed.

    Raises:
        ValueError: if it has no config that says what it is, or needs code that is not trusted.
        OSError: if it cannot be found.
    """
    _refuse_adapter(name)
    kind = _loading_class(name, trust)
    if away is not None:
        on_disk = {"device_map": {"": "disk"}, "offload_folder": away}
        return kind.from_pretrained(name, dtype=dtype, trust_remote_code=trust, **on_disk).eval()
    model = kind.from_pretrained(name, dtype=dtype, trust_remote_code=trust)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def model_on_meta(name: str, trust: bool = False) -> Any:
    """A model without weights: only its config is read."""
    _refuse_adapter(name)
    kind, config = _loading_class(name, trust), _config(name, trust)
    with torch.device("meta"):
        if kind.__name__.startswith("AutoModel"):
            return kind.from_config(config, trust_remote_code=trust)
        return kind(config)


def load_adapter(
    adapter: str, base: str | None, dtype: str = "auto", trust: bool = False, option: str = "--base"
) -> Any:
    """A model with an adapter on it.

    Args:
        adapter: the adapter's Hub id or path.
        base: the model it belongs to; None: the one that its configuration names.
        dtype: of the model.
        trust: whether to run code that comes with the model.
        option: by which the command is given a base.

    Raises:
        ValueError: if the adapter does not say which model it belongs to, or does not fit it.
    """
    if Path(adapter).is_dir() and not is_adapter(adapter):
        raise ValueError(f"{adapter} has no {ADAPTER}, so it is no adapter. `peft-fusion fuse` takes models.")
    base = base or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not base:
        raise ValueError(f"The adapter {adapter} does not name the model that it was made for: give it by {option}.")
    model = PeftModel.from_pretrained(load_model(base, dtype, trust), adapter)
    return model.eval()


def is_adapter(name: str) -> bool:
    """Whether a local path holds an adapter and not a model."""
    return Path(name, ADAPTER).is_file()


def load_tokenizer(name: str, without: str | None = None) -> PreTrainedTokenizerBase | None:
    """A model's tokenizer.

    Args:
        name: the model.
        without: what a warning tells where there is none, and None is returned; None: that is refused.

    Raises:
        ValueError: if there is none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
        return tokenizer
    except (OSError, ValueError, KeyError) as error:
        if without is None:
            raise ValueError(f"{name} has no tokenizer that can be loaded ({error}).") from error
        warnings.warn(f"{name} has no tokenizer that can be loaded, so {without}.", stacklevel=2)
        return None


def text_batches(file: Path, name: str, sequences: int, length: int) -> list[dict[str, Tensor]]:
    """The beginning of a text file, as batches of sequences without padding.

    Args:
        file: the text.
        name: the model whose tokenizer is used.
        sequences: how many to take at most.
        length: tokens in each.

    Raises:
        ValueError: if it is no text, or shorter than one sequence.
    """
    tokenizer = load_tokenizer(name)
    assert tokenizer is not None
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no plain text in UTF-8 ({error.reason} at byte {error.start}).") from error
    read = text[: 32 * sequences * length]  # of the longest of texts a part will do
    ids = tokenizer(read, return_tensors="pt", verbose=False)["input_ids"][0]
    count = min(sequences, len(ids) // length)
    if not count:
        raise ValueError(f"{file} has {len(ids)} tokens, less than one sequence of {length}. Give more text.")
    return [{"input_ids": part} for part in ids[: count * length].reshape(count, length).split(BATCH)]


def check_length(model: Any, length: int) -> None:
    """Refuses sequences that are longer than a model was made for.

    Raises:
        ValueError: naming the most that it reads.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and length > most:
        raise ValueError(f"--length {length}: {type(model).__name__} reads at most {most} tokens. Give less.")


def _refuse_adapter(name: str) -> None:
    if is_adapter(name):
        raise ValueError(f"{name} is an adapter, not a model. `peft-fusion export {name} OUT` makes a model of it.")


def _config(name: str, trust: bool) -> Any:
    """A model's config.

    Raises:
        OSError: if there is none, saying that a name that is no folder here was taken for an id.
    """
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust)
    except OSError as error:
        if Path(name).exists():
            raise
        raise OSError(
            f"There is no folder {name} here, and as an id on the Hub it could not be loaded: {error}"
        ) from error


def _loading_class(name: str, trust: bool) -> Any:
    """The class of transformers that loads a model with the head that it was saved with."""
    config = _config(name, trust)
    autos = [auto for auto in getattr(config, "auto_map", None) or {} if auto.startswith("AutoModel")]
    if autos and not trust:
        raise ValueError(f"{name} is loaded by code that comes with it. Read that, then pass --trust-remote-code.")
    if autos:
        return getattr(transformers, next((auto for auto in autos if auto != "AutoModel"), "AutoModel"))
    named = [getattr(transformers, kind, None) for kind in config.architectures or ()]
    return next(iter(filter(None, named)), transformers.AutoModel)
