"""`peft-fusion compare`: two models side by side, each loaded on its own."""

from __future__ import annotations

import math
import time
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..observe.networks import Network
from ..observe.outputs import main_output
from ..observe.own_inputs import OWN_LENGTH
from ..progress import progress
from .models import check_length, load_model, text_batches
from .options import Dtype, Json, Length, Original, Precision, Sequences, Text, Trust, show

PROMPT = 8


def compare(
    original: Original,
    exported: Annotated[str, typer.Argument(help="Hub id or local path of the smaller model.")],
    text: Text = None,
    sequences: Sequences = 32,
    length: Length = OWN_LENGTH,
    tokens: Annotated[int, typer.Option(help="Tokens to generate greedily, to take the time.", min=1)] = 64,
    dtype: Dtype = Precision.auto,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Compares two models: outputs, perplexity on a text, speed of greedy generation, sizes.

    Example: peft-fusion compare HuggingFaceTB/SmolLM2-135M small --text book.txt --trust-remote-code
    """
    batches = text_batches(text, original, sequences, length) if text else None
    rows, outputs = [], []
    for name in (original, exported):
        model = load_model(name, dtype.value, trust)
        check_length(model, length)
        batches = batches or [_random_tokens(model, sequences, length)]
        row, output = _measured(model, batches, tokens, is_text=text is not None)
        rows.append({"model": name, **row})
        outputs.append(output)
        del model
    if outputs[0].shape != outputs[1].shape:
        raise ValueError(
            f"{original} puts out a tensor of shape {tuple(outputs[0].shape)}, but {exported} one of "
            f"{tuple(outputs[1].shape)}: they are not the same model with and without narrow FFNs."
        )
    difference = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
    agreement = float((outputs[1].argmax(-1) == outputs[0].argmax(-1)).float().mean())
    result = {"original": rows[0], "exported": rows[1], "difference": difference, "same_prediction": agreement}
    hint = "" if text else "\non random tokens; --text FILE compares on a text, by perplexity too"
    show(result, _table(rows, difference, agreement) + hint, json)


def _random_tokens(model: Any, sequences: int, length: int) -> dict[str, Tensor]:
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if getattr(model, "main_input_name", "") != "input_ids" or vocabulary is None:
        raise ValueError(f"{type(model).__name__} takes no tokens, so that there is nothing to compare it on here.")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (min(sequences, 8), length), generator=generator)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


def _measured(
    model: Any, batches: list[dict[str, Tensor]], tokens: int, is_text: bool
) -> tuple[dict[str, Any], Tensor]:
    """A model's figures, and what it puts out for the first batch; of random tokens a perplexity means nothing."""
    row: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }
    network, first, loss, count = Network(model, [], fused=False), None, 0.0, 0
    causal = model.can_generate() and not model.config.is_encoder_decoder
    with network.running(), torch.no_grad():
        for batch in progress(batches, "Outputs"):
            output = main_output(network(batch))
            if output is None:
                raise ValueError(f"{type(model).__name__} puts out no tensor to compare.")
            output = output.float().cpu()
            first = output if first is None else first
            if causal:
                ids = batch["input_ids"][:, 1:]
                loss += float(cross_entropy(output[:, :-1].flatten(0, 1), ids.flatten(), reduction="sum"))
                count += ids.numel()
        if causal:
            row |= {"perplexity": math.exp(loss / count)} if is_text else {}
            row["tokens_per_second"] = _speed(model, batches[0]["input_ids"][:1, :PROMPT], tokens)
    assert first is not None
    return row, first


def _speed(model: Any, prompt: Tensor, tokens: int) -> float:
    """Tokens a second of greedy generation of one sequence; the first call, which warms up, does not count."""
    prompt = prompt.to(model.device)
    options = {"do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    for count in (2, tokens):
        started = time.perf_counter()
        made = model.generate(prompt, min_new_tokens=count, max_new_tokens=count, **options)
    return float((made.shape[1] - prompt.shape[1]) / (time.perf_counter() - started))


def _table(rows: list[dict[str, Any]], difference: float, agreement: float) -> str:
    """Both models, figure by figure."""
    lines = [f"{'':18}{'original':>16}{'exported':>16}"]
    for name in (key for key in rows[0] if key != "model"):
        values = [f"{row[name]:,}" if isinstance(row[name], int) else f"{row[name]:,.4g}" for row in rows]
        lines.append(f"{name.replace('_', ' '):18}{values[0]:>16}{values[1]:>16}")
    lines.append(
        f"outputs differ by {difference:.3g} of their norm; the same prediction at {agreement:.1%} of positions"
    )
    return "\n".join(lines)
