"""`peft-fusion fuse` and `export`: a smaller model out of a model, or out of a model and its adapter."""

from __future__ import annotations

from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from peft import get_peft_model
from torch import Tensor

from ..calibrate import calibrate as calibrate_model
from ..distill import distill as distill_model
from ..export import Exported, export, export_fused, fused_by_itself
from ..export.folder import check_free
from ..ffn import find_all
from ..fusing.methods import METHODS
from ..fusing.recipe import AUTO, REFITS
from ..observe.own_inputs import OWN_LENGTH
from ..tuner.config import ALLOCATIONS, FusionConfig
from .models import check_length, load_adapter, load_model, load_tokenizer, model_on_meta, text_batches
from .options import Check, Dtype, Json, Original, Out, Overwrite, Precision, Trust, layer_numbers, show

Allocation = Enum("Allocation", {name: name for name in ALLOCATIONS}, type=str)  # type: ignore[misc]
Method = Enum("Method", {name: name for name in METHODS}, type=str)  # type: ignore[misc]
Refit = Enum("Refit", {name: name for name in (AUTO, *REFITS)}, type=str)  # type: ignore[misc]
OWN = "own"
NONE_WRITTEN = "none is written beside the model"


def fuse(
    model: Original,
    out: Out,
    ratio: Annotated[float, typer.Option(help="Fraction of each FFN's neurons that is kept.")] = 0.5,
    width: Annotated[int | None, typer.Option(help="The width itself; wins over --ratio.", min=1)] = None,
    layers: Annotated[str, typer.Option(help='Layers whose FFNs are fused: "all", or such as 14-29 or 3,5,8.')] = "all",
    calibrate: Annotated[
        str | None,
        typer.Option(help='Text file to calibrate on, or "own" for text that the model samples; without, no data.'),
    ] = None,
    sequences: Annotated[int | None, typer.Option(help="Sequences to calibrate on.", min=4)] = None,
    length: Annotated[
        int | None,
        typer.Option(help=f"Tokens of a sequence, of --calibrate and --distill; {OWN_LENGTH} unless given.", min=2),
    ] = None,
    allocation: Annotated[
        Allocation,
        typer.Option(help="Of the neurons: uniform, or fisher: where they count, after --calibrate."),
    ] = Allocation.uniform,  # type: ignore[attr-defined]
    distill: Annotated[
        int | None,
        typer.Option(
            help="Then learn the original's predictions on so many tokens: of --calibrate's file, or own.", min=1
        ),
    ] = None,
    refit: Annotated[
        Refit,
        typer.Option(help="Of out-projections, after --calibrate: ridge, or sequential: in each other's company, too."),
    ] = Refit.auto,  # type: ignore[attr-defined]
    method: Annotated[Method, typer.Option(help="How narrow FFNs are made.")] = Method.fusion,  # type: ignore[attr-defined]
    seed: int = 0,
    dtype: Dtype = Precision.auto,
    offload: Annotated[
        bool,
        typer.Option(
            "--offload", help="Leave weights on disk until they are needed; without --calibrate and --distill: always."
        ),
    ] = False,
    overwrite: Overwrite = False,
    check: Check = True,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Makes a model's FFNs narrower, and writes a plain model with tokenizer and card.

    One width for all layers gives a checkpoint that loads everywhere; with --layers widths differ, and the result is
    loaded by trust_remote_code=True. By weights alone it works FFN by FFN, in less memory than the model takes.

    Example: peft-fusion fuse HuggingFaceTB/SmolLM2-135M small --ratio 0.5 --layers 14-29 --calibrate own
    """
    settings: dict[str, Any] = {
        "ratio": ratio,
        "intermediate_size": width,
        "layers_to_transform": layer_numbers(layers),
        "allocation": allocation.value,
        "refit": refit.value,
        "method": method.value,
        "seed": seed,
    }
    config = FusionConfig(**settings)
    check_free(out.absolute(), overwrite)
    if calibrate is None and sequences is not None:
        raise ValueError(f"--sequences {sequences} is of --calibrate, which is not given. Add it, or leave this out.")
    if calibrate is None and distill is None and length is not None:
        raise ValueError(f"--length {length} is of --calibrate and --distill; add one of them, or leave this out.")
    file = Path(calibrate) if calibrate not in (None, OWN) else None
    if file is not None and not file.is_file():
        raise ValueError(f'--calibrate {file}: no such file. Give a text file, or "{OWN}".')
    bare = model_on_meta(model, trust)
    if calibrate is not None or distill is not None:
        check_length(bare, length or OWN_LENGTH)
    tokenizer = load_tokenizer(model, NONE_WRITTEN)
    one_by_one = calibrate is None and distill is None and fused_by_itself(find_all(bare), config)
    sampled: dict[str, Any] = {} if file else {"length": length, "tokenizer": tokenizer}
    away = None
    with ExitStack() as stack:
        if offload or (one_by_one and not torch.cuda.is_available()):
            away = Path(
                stack.enter_context(TemporaryDirectory(prefix=f".{out.name}.offloaded-", dir=_made(out.parent)))
            )
        loaded = load_model(model, dtype.value, trust, away)
        if one_by_one:
            done = export_fused(loaded, config, out, tokenizer=tokenizer, overwrite=overwrite, check=check)
        else:
            if calibrate is not None:
                batches = text_batches(file, model, sequences or 128, length or OWN_LENGTH) if file else None
                calibrate_model(loaded, config, batches, sequences=sequences, **sampled)
            fused = get_peft_model(loaded, config)
            if distill is not None:
                data = _to_distill(file, model, distill, length or OWN_LENGTH) if file else None
                distill_model(fused, data, tokens=distill, seed=seed, **sampled)
            done = export(fused, out, tokenizer=tokenizer, overwrite=overwrite, check=check)
    show(done, summary(done), json)


def _to_distill(file: Path, model: str, tokens: int, length: int) -> list[dict[str, Tensor]]:
    """As many sequences of a file as make up so many tokens."""
    return text_batches(file, model, -(-tokens // length), length)


def _made(folder: Path) -> Path:
    """A folder, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def export_adapter(
    adapter: Annotated[str, typer.Argument(help="Hub id or local path of a saved adapter.")],
    out: Out,
    base: Annotated[
        str | None, typer.Option(help="The model that it belongs to; without, the one that the adapter names.")
    ] = None,
    dtype: Dtype = Precision.auto,
    overwrite: Overwrite = False,
    check: Check = True,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Merges a saved adapter into its model, and writes a plain model with tokenizer and card.

    Example: peft-fusion export adapter small
    """
    check_free(out.absolute(), overwrite)
    model = load_adapter(adapter, base, dtype.value, trust)
    tokenizer = load_tokenizer(model.get_base_model().config._name_or_path, NONE_WRITTEN)
    done = export(model, out, tokenizer=tokenizer, overwrite=overwrite, check=check)
    show(done, summary(done), json)


def summary(done: Exported) -> str:
    """What was written, in a few lines."""
    before, now = done.parameters
    lines = [
        f"wrote {done.directory}: {now:,} parameters of {before:,} ({now / before:.1%}), {done.size / 1e6:,.1f} MB",
        f"{len(done.widths)} FFNs are narrower",
    ]
    if done.difference is not None:
        lines.append(f"loaded in a fresh process, its outputs differ by {done.difference:.1e} from the fused model's")
    code = ", trust_remote_code=True" if done.needs_code else ""
    return "\n".join([*lines, f'load it by {done.loaded_by}.from_pretrained("{done.directory}"{code})'])
