"""A checkpoint fused by its weights alone, FFN by FFN: what is narrow is written to a scratch folder as it is made.

Of a model that accelerate dispatched to disk no more than one FFN, or one shard of the result, is ever in memory.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.hooks import AlignDevicesHook
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..ffn import AnyFFN, Experts, check_finite, find_all, read_ffn
from ..fusing.methods import find_method
from ..fusing.recipe import Recipe
from ..fusing.settle import settle
from ..observe.forwards import Forward, with_forwards
from ..observe.unwrap import unwrapped
from ..progress import progress
from ..tuner.build import narrow_projections
from ..tuner.config import FusionConfig
from ..tuner.narrow import NarrowProjection, plain_projection
from ..tuner.plan import PlannedFFN, plan_ffns
from ..tuner.recipe import asked_recipe
from .check import outputs_to_match, random_batch
from .folder import check_free
from .merged import active_configs, check_mergeable, merged_copy
from .written import Exported, checked_form, made_of, write_checked


def export_fused(
    model: nn.Module,
    config: FusionConfig,
    directory: str | os.PathLike,
    *,
    tokenizer: Any = None,
    check: bool = True,
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
) -> Exported:
    """Writes the checkpoint that `get_peft_model(model, config)` and `export` would, byte for byte, in less memory.

    Beyond the model it takes what fusing one FFN takes, and one shard of the result; on disk, for a while, the narrow
    FFNs once more. A model that lies on disk (`device_map={"": "disk"}`) is read FFN by FFN.

    Args:
        model: the original, a plain transformers model; it stays as it is.
        config: what to fuse and how, by weights alone.
        directory: where to; not there yet, or empty.
        tokenizer: what has a `save_pretrained` of its own, or None.
        check: whether to load the checkpoint in a fresh process and to compare outputs on random tokens.
        overwrite: whether to replace a model that is there.
        max_shard_size: of one file of weights.

    Returns:
        What was written.

    Raises:
        ValueError: before any work, if the configuration does not fit the model or cannot be had this way, the
            directory is taken, or no checkpoint can state the widths.
        RuntimeError: if what was written does not load, or computes something else; nothing is left of it then.
    """
    target, host = Path(os.path.abspath(directory)), unwrapped(model)
    check_mergeable(host)
    check_free(target, overwrite)
    plan, recipe = _planned(host, config)
    widths = {ffn.name: (ffn.width, ffn.width) for ffn in find_all(host)}
    widths |= {p.ffn.name: (p.ffn.width, p.width) for p in plan}
    form = checked_form(host, {name: now for name, (_, now) in widths.items()})
    recorded = copy.copy(config)
    recorded.fused_by = recipe.to_dict()
    batch = random_batch(host) if check else None
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.narrow-", dir=target.parent) as scratch:
        narrow = dict(_narrowed(plan, recipe, Path(scratch)))
        expected = None
        if batch is not None:
            with _in_place(host, narrow):
                expected = outputs_to_match(host, batch)
        merged = _with_narrow(merged_copy(host), narrow)
        made = made_of(host, merged, form, widths, [recorded], tokenizer is not None, "")
        return write_checked(target, form, merged, made, tokenizer, max_shard_size, ".", batch, expected)


def fused_by_itself(ffns: Iterable[AnyFFN], config: FusionConfig) -> bool:
    """Whether each of these FFNs can be fused by its own weights alone, so that `export_fused` can do it."""
    alone = config.allocation == "uniform" and not find_method(config.method).low_rank
    return alone and not any(isinstance(ffn, Experts) for ffn in ffns)


def _planned(host: nn.Module, config: FusionConfig) -> tuple[list[PlannedFFN], Recipe]:
    """What to fuse and how; refuses what cannot be done FFN by FFN."""
    if active_configs(host):
        raise ValueError(f"{type(host).__name__} has adapters. `export` merges them; here a plain model is fused.")
    plan = plan_ffns(host, config)
    if not fused_by_itself((p.ffn for p in plan), config):
        raise ValueError(
            f'With `allocation="{config.allocation}"` and `method="{config.method}"`, or routed experts, FFNs are not '
            "fused one by one: that takes fewer neurons, by widths that do not depend on each other, and linear "
            "projections. Use `get_peft_model` and `export`."
        )
    return [p for p in plan if isinstance(p, PlannedFFN)], settle(asked_recipe(config))


class OnDisk(Mapping[str, Tensor]):
    """Tensors of a safetensors file by name; each is read when it is asked for, and not kept."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.file, framework="pt") as tensors:
            found: Tensor = tensors.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        with safe_open(self.file, framework="pt") as tensors:
            return iter(tensors.keys())

    def __len__(self) -> int:
        return sum(1 for _ in self)


Narrow = dict[str, tuple[nn.Module, OnDisk]]
"""A projection's name -> the plain module that takes its place, on the meta device, and its tensors."""


def _narrowed(
    plan: Sequence[PlannedFFN], recipe: Recipe, folder: Path
) -> Iterator[tuple[str, tuple[nn.Module, OnDisk]]]:
    """Fuses one FFN after another, and keeps what comes out in files."""
    for planned in progress(plan, "Fusing FFNs"):
        check_finite(read_ffn(planned.ffn), planned.ffn)
        narrow = narrow_projections(planned, recipe)
        for name, original, projection in zip(
            planned.ffn.projection_names, planned.ffn.base_projections, narrow, strict=True
        ):
            assert isinstance(projection, NarrowProjection)
            weight, bias = projection.folded()
            plain = plain_projection(original, weight.detach(), None if bias is None else bias.detach())
            file = folder / f"{name}.safetensors"
            save_file({key: tensor.contiguous() for key, tensor in plain.state_dict().items()}, file)
            yield name, (plain.to("meta"), OnDisk(file))


def _in_place(host: nn.Module, narrow: Narrow) -> Any:
    """Has a model compute with narrow FFNs as long as the block runs."""
    modules = {id(host.get_submodule(name)): both for name, both in narrow.items()}

    def forward(original: nn.Module) -> Forward:
        plain, tensors = modules[id(original)]
        return lambda x: functional_call(plain, dict(tensors), x)

    return with_forwards([host.get_submodule(name) for name in narrow], forward)


def _with_narrow(merged: PreTrainedModel, narrow: Narrow) -> PreTrainedModel:
    """A plain copy with narrow FFNs, whose weights `save_pretrained` fetches shard by shard."""
    for name, (plain, tensors) in narrow.items():
        plain._hf_hook = AlignDevicesHook(offload=True, weights_map=tensors)
        merged.set_submodule(name, plain)
    merged.hf_device_map = {"": "cpu"}  # what it looks at to know
    return merged
