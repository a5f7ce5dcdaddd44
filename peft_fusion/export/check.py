"""Whether an exported model, loaded in a fresh process by transformers alone, puts out what the fused model does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..observe.batches import Batch, check_batch
from ..observe.networks import Network
from ..observe.outputs import main_output

LENGTH = 16
LAST_LINES = 4


def outputs_to_match(host: Any, batch: Batch) -> Tensor:
    """What a model puts out for a batch with its active adapters: logits, or hidden states; in float32 on the CPU.

    Raises:
        ValueError: if the model does not take the batch.
    """
    check_batch(batch)
    network = Network(host, [], fused=True)
    with network.running(), torch.no_grad():
        found = main_output(network(batch))
    if found is None:
        raise ValueError(f"{type(host).__name__} puts out no tensor to compare. Export it with `check=False`.")
    return found.detach().float().cpu()


def random_batch(host: Any) -> dict[str, Tensor]:
    """One sequence of random tokens, or one random image; torch's global random state is left alone.

    Raises:
        ValueError: if the model takes something else.
    """
    generator = torch.Generator().manual_seed(0)
    config, takes = host.config, getattr(host, "main_input_name", "input_ids")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if takes == "input_ids" and isinstance(getattr(text, "vocab_size", None), int):
        vocabulary = text.vocab_size
        with suppress(AttributeError, NotImplementedError):  # an embedding may hold fewer than the config says
            vocabulary = min(vocabulary, host.get_input_embeddings().num_embeddings)
        length = min(LENGTH, (getattr(text, "max_position_embeddings", None) or LENGTH + 2) - 2)
        ids = torch.randint(0, vocabulary, (2, 1, length), generator=generator)
        return {"input_ids": ids[0], **({"decoder_input_ids": ids[1]} if config.is_encoder_decoder else {})}
    size = getattr(config, "image_size", None)
    if takes == "pixel_values" and size is not None:
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {"pixel_values": torch.randn(1, config.num_channels, height, width, generator=generator)}
    raise ValueError(
        f"{type(host).__name__} takes `{takes}`, for which `export` cannot make up a value. Give a batch to compare "
        "outputs on (`check=batch`), or `check=False`."
    )


def tolerance(model: nn.Module) -> float:
    """How far outputs may differ, of their size: folding the scale rounds once more in the model's precision."""
    return max(1e-4, 8 * max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()))


def check_reload(
    folder: Path, kind: str, batch: Batch, expected: Tensor, allowed: float, on_disk: bool = False
) -> float:
    """Loads a checkpoint in a fresh process, and compares.

    Args:
        folder: the checkpoint.
        kind: the class to load it by.
        batch: the model's inputs, tensors.
        expected: what it is to put out.
        allowed: by how much it may differ, as a fraction of the outputs' norm.
        on_disk: whether its weights are to stay there while it computes, for memory may not hold them.

    Returns:
        By how much it differs.

    Raises:
        RuntimeError: if it cannot be loaded, tensors are missing or too many, or outputs differ by more.
    """
    (found, misfits), *_ = reloaded([(folder, kind, batch)], on_disk)
    if misfits:
        raise RuntimeError(f"The exported model was loaded, but {misfits}. Nothing was left at the directory.")
    error = float((found - expected).norm() / expected.norm()) if found.shape == expected.shape else float("nan")
    if not error <= allowed:
        raise RuntimeError(
            f"The exported model was loaded, but its outputs of shape {tuple(found.shape)} differ from the fused "
            f"model's, {tuple(expected.shape)}, by {error:.1e} of their norm, where {allowed:.1e} is allowed. Nothing "
            "was left at the directory; `check=False` exports without comparing."
        )
    return error


def reloaded(jobs: list[tuple[Path, str, Batch]], on_disk: bool = False) -> list[tuple[Tensor, dict[str, Any]]]:
    """Loads checkpoints in a fresh process, in which neither this package nor PEFT can be imported, and runs them.

    Args:
        jobs: for each the folder, the class to load it by, and its inputs.
        on_disk: whether weights stay there.

    Returns:
        For each what it puts out, and what did not fit in loading.

    Raises:
        RuntimeError: with the last lines of what the process said, if it failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        told = []
        for number, (folder, kind, batch) in enumerate(jobs):
            files = {name: str(Path(scratch, f"{name}-{number}.safetensors")) for name in ("inputs", "outputs")}
            save_file({key: value.cpu().contiguous() for key, value in _tensors(batch).items()}, files["inputs"])
            away = str(Path(scratch, f"away-{number}")) if on_disk else ""
            told.append({"directory": str(folder), "kind": kind, **files, "away": away})
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch, "modules")), "HF_HUB_OFFLINE": "1"}
        text = Path(__file__).with_name("reload.py").read_text(encoding="utf-8")
        command = [sys.executable, "-c", text, json.dumps(told)]
        done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
        if done.returncode:
            last = "\n".join(done.stderr.strip().splitlines()[-LAST_LINES:])
            raise RuntimeError(
                f"The exported model could not be loaded and run in a fresh process (exit status {done.returncode}). "
                f"Nothing was left at the directory; `check=False` exports without trying. It said:\n{last}"
            )
        misfits = json.loads(done.stdout.strip().splitlines()[-1])
        return [(load_file(job["outputs"])["output"], misfit) for job, misfit in zip(told, misfits, strict=True)]


def _tensors(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if isinstance(value, Tensor)}
