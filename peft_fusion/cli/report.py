"""`peft-fusion report`: how close a fused model is to its original."""

from __future__ import annotations

import json as json_module
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ..fidelity import fidelity
from ..observe.own_inputs import OWN_LENGTH, own_inputs
from ..observe.sampling import prefix_of
from .models import check_length, is_adapter, load_adapter, load_model, load_tokenizer, text_batches
from .options import Dtype, Json, Length, Precision, Sequences, Text, Trust, show


def report(
    model: Annotated[str, typer.Argument(help="An exported model, or a saved adapter.")],
    original: Annotated[
        str | None, typer.Option(help="The original; an adapter names its own, a model needs it here.")
    ] = None,
    text: Text = None,
    sequences: Sequences = 32,
    length: Length = OWN_LENGTH,
    dtype: Dtype = Precision.auto,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Compares a fused model with its original: outputs, tangent kernels, parameters, FLOPs.

    Without --text it is measured on what the original samples itself.

    Example: peft-fusion report small --original HuggingFaceTB/SmolLM2-135M --text book.txt
    """
    if is_adapter(model):
        fused, reference = load_adapter(model, original, dtype.value, trust, "--original"), None
        name = fused.get_base_model().config._name_or_path
    elif original is None:
        raise ValueError(
            f"{model} is a model and not an adapter, so it has to be told what to compare it with: --original."
        )
    else:
        fused, reference, name = (
            load_model(model, dtype.value, trust),
            load_model(original, dtype.value, trust),
            original,
        )
    check_length(fused, length)
    prefix = None if text else prefix_of(load_tokenizer(name, "text is sampled that begins as its config says"))
    if text:
        batches = text_batches(text, name, sequences, length)
    elif reference is not None:
        batches = own_inputs(reference, sequences, length, seed=0, prefix=prefix)
    else:
        with fused.disable_adapter():
            batches = own_inputs(fused.get_base_model(), sequences, length, seed=0, prefix=prefix)
    found = fidelity(fused, batches, reference=reference, sequences=sequences)
    with tempfile.TemporaryDirectory() as folder:
        found.to_json(file := Path(folder, "report.json"))
        show(json_module.loads(file.read_text(encoding="utf-8")), str(found), json)
