"""`peft-fusion layouts`: which FFNs a model has."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer

from ..ffn import list_ffns, unreadable_projections
from .models import model_on_meta
from .options import Json, Trust, show
from .plan import element_size, operations_a_second, plan


def layouts(
    model: Annotated[str, typer.Argument(help="Hub id or local path; only its config is read.")],
    costs: Annotated[
        bool, typer.Option("--plan", help="What calibrating, fusing, training and distilling take: bytes and seconds.")
    ] = False,
    ratio: Annotated[float, typer.Option(help="With --plan: the fraction of neurons kept.", min=0.01, max=1)] = 0.5,
    ffns_per_pass: Annotated[
        int | None, typer.Option(help="With --plan: FFNs that calibrate works on at once; all of them.", min=1)
    ] = None,
    json: Json = False,
    trust: Trust = False,
) -> None:
    """Lists a model's FFNs: name, layout, width and parameters; or says what fusing them takes on this machine.

    Example: peft-fusion layouts HuggingFaceTB/SmolLM2-135M --plan --ratio 0.25
    """
    built = model_on_meta(model, trust)
    rows = list_ffns(built)
    if not rows:
        unread = unreadable_projections(built)
        raise ValueError(
            f"{model} has no FFN of a layout that is known"
            + (f"; its projections are of the class {', '.join(unread)}." if unread else ".")
        )
    if costs:
        _show_plan(model, built, ratio, ffns_per_pass, json)
        return
    total = sum(parameter.numel() for parameter in built.parameters())
    inside = sum(row["parameters"] for row in rows)
    size = max(len(row["name"]) for row in rows)
    lines = [f"{row['name']:{size}}  {row['width']:>6}  {row['parameters']:>12,}  {row['layout']}" for row in rows]
    lines.append(f"{len(rows)} FFNs hold {inside:,} of {total:,} parameters ({inside / total:.0%})")
    show({"model": model, "parameters": total, "ffns": rows}, "\n".join(lines), json)


def _show_plan(name: str, built: Any, ratio: float, ffns_per_pass: int | None, json: bool) -> None:
    rate = operations_a_second(getattr(built.config, "dtype", None) or torch.float32)
    weights = element_size(built) * sum(parameter.numel() for parameter in built.parameters())
    rows = plan(built, ratio, ffns_per_pass, rate)
    lines = [f"{'weights':16} {weights / 1e9:9.2f} GB"]
    lines += [f"{row.step:16} {row.bytes / 1e9:9.2f} GB more {row.seconds:12,.1f} s" for row in rows]
    lines.append(f"at least, at {rate / 1e9:,.0f} billion operations a second, as this machine does now")
    found = {"model": name, "weights": weights, "rate": rate, "steps": [asdict(row) for row in rows]}
    show(found, "\n".join(lines), json)
