"""`peft-fusion layouts`: which FFNs a model has."""

from __future__ import annotations

from typing import Annotated

import typer

from ..ffn import list_ffns, unreadable_projections
from .models import model_on_meta
from .options import Json, Trust, show


def layouts(
    model: Annotated[str, typer.Argument(help="Hub id or local path; only its config is read.")],
    json: Json = False,
    trust: Trust = False,
) -> None:
    """Lists a model's FFNs: name, layout, width and parameters.

    Example: peft-fusion layouts HuggingFaceTB/SmolLM2-135M
    """
    built = model_on_meta(model, trust)
    rows = list_ffns(built)
    if not rows:
        unread = unreadable_projections(built)
        raise ValueError(
            f"{model} has no FFN of a layout that is known"
            + (f"; its projections are of the class {', '.join(unread)}." if unread else ".")
        )
    total = sum(parameter.numel() for parameter in built.parameters())
    inside = sum(row["parameters"] for row in rows)
    size = max(len(row["name"]) for row in rows)
    lines = [f"{row['name']:{size}}  {row['width']:>6}  {row['parameters']:>12,}  {row['layout']}" for row in rows]
    lines.append(f"{len(rows)} FFNs hold {inside:,} of {total:,} parameters ({inside / total:.0%})")
    show({"model": model, "parameters": total, "ffns": rows}, "\n".join(lines), json)
