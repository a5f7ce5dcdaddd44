"""How fast what one leaves with is: original, merged with one width and merged with many, in transformers.

    python benchmarks/inference.py                  SmolLM2-135M's shape (minutes); on the GPU where there is one
    python benchmarks/inference.py --dtype bfloat16
    python benchmarks/inference.py --smoke          a small shape, seconds; its figures mean nothing
    python benchmarks/inference.py --json out.json  also as JSON

Tokens a second of prefill (a prompt in one piece) and decode (one token after another, with a cache), for batches of 1
and 16, and the bytes of the weights. Speed does not depend on weights, so they are random. Half of the neurons are kept
on average: "uniform" models have the same width in all layers, those at and just below a multiple of 64, so that
anything but their sizes shows; "mixed" ones spread them evenly from a quarter to three quarters of the full one, in a
random order, rounded to a multiple. The models take turns, and the fastest run of each counts: what else runs on the
machine slows the others.

`examples/serve.py` has the rows of vLLM and llama.cpp, which load exported checkpoints.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import get_peft_model
from shapes import LAYERS, SMOKE, VOCABULARY, WIDTH, batch, llama
from torch import Tensor, nn

from peft_fusion import FusionConfig

BATCHES = (1, 16)
BELOW = (0, 1, 2, 4, 8, 16, 32)
MULTIPLES = (1, 8, 16, 64, 128)
Row = dict[str, float]


def main() -> None:
    options = parse_arguments()
    sizes = SMOKE if options.smoke else {"layers": options.layers}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {name: model.to(device, getattr(torch, options.dtype)) for name, model in all_models(sizes).items()}
    rows: dict[str, Row] = {name: {"MB": megabytes(model)} for name, model in models.items()}
    vocabulary = sizes.get("vocabulary", VOCABULARY)
    for size in BATCHES:
        ids = batch(size, options.length, vocabulary)["input_ids"].to(device)
        for kind, tokens, run in (("prefill", ids.numel(), prefill), ("decode", size * options.tokens, decode)):
            seconds = time_in_turns(models, ids, options, run)
            for name, fewest in seconds.items():
                rows[name][f"{kind} {size}"] = tokens / fewest
    columns = ["MB", *(f"{kind} {size}" for size in BATCHES for kind in ("prefill", "decode"))]
    print(f"{options.dtype} on {device.type}, {torch.get_num_threads()} threads; tokens a second")
    print(f"{'':22}" + "".join(f"{column:>13}" for column in columns))
    for name, row in rows.items():
        print(f"{name:22}" + "".join(f"{row[column]:13.1f}" for column in columns))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS, help="layers of the model (default: %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8, help="tokens to decode (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--smoke", action="store_true", help="a small shape and few runs: does it work?")
    options = parser.parse_args()
    if options.smoke:
        options.length, options.tokens, options.repeats = 8, 2, 1
    return options


def all_models(sizes: dict[str, int]) -> dict[str, nn.Module]:
    """Original, uniform and mixed, in eval mode."""
    full, layers = sizes.get("width", WIDTH), sizes["layers"]
    half = full // 2 // 64 * 64
    models = {f"original {full}": llama(**sizes).eval()}
    for width in (half - below for below in BELOW):
        models[f"uniform {width}"] = merged(sizes, [width] * layers)
    for multiple in MULTIPLES:
        models[f"mixed, multiple of {multiple}"] = merged(sizes, mixed_widths(full, layers, multiple))
    return models


def mixed_widths(full: int, layers: int, multiple: int) -> list[int]:
    """One a layer, half of the full one on average."""
    order = torch.randperm(layers, generator=torch.Generator().manual_seed(0)).tolist()
    spread = [full / 4 + full / 2 * (place + 0.5) / layers for place in order]
    return [max(multiple, round(width / multiple) * multiple) for width in spread]


def merged(sizes: dict[str, int], widths: list[int]) -> nn.Module:
    """A plain model of these widths, one a layer, as it is once its adapter is merged."""
    pattern = {rf"model\.layers\.{layer}\.mlp": width for layer, width in enumerate(widths)}
    config = FusionConfig(init_weights=False, width_pattern=pattern)
    model = get_peft_model(llama(**sizes), config).merge_and_unload().eval()
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == widths
    return model


def megabytes(model: nn.Module) -> float:
    return sum(parameter.nbytes for parameter in model.parameters()) / 1e6


def time_in_turns(
    models: dict[str, nn.Module],
    ids: Tensor,
    options: argparse.Namespace,
    run: Callable[[nn.Module, Tensor, int], Callable[[], object]],
) -> dict[str, float]:
    """The fewest seconds of every model's runs; one more comes before, and is not counted."""
    runs = {name: run(model, ids, options.tokens) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for repeat in range(options.repeats + 1):
            for name in list(models) if repeat % 2 else list(reversed(models)):
                timed = time_of(runs[name])
                if repeat:
                    seconds[name].append(timed)
    return {name: min(times) for name, times in seconds.items()}


def time_of(run: Callable[[], object]) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


def prefill(model: nn.Module, ids: Tensor, tokens: int) -> Callable[[], object]:
    """Runs a prompt for its last token's logits."""
    return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)


def decode(model: nn.Module, ids: Tensor, tokens: int) -> Callable[[], object]:
    """Makes tokens behind a prompt that has been run; the cache is cut back each time."""
    with torch.inference_mode():
        first = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    cache, start = first.past_key_values, first.logits[:, -1:].argmax(-1)

    def run() -> None:
        last = start
        for _ in range(tokens):
            last = model(input_ids=last, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        cache.crop(-tokens)

    return run


if __name__ == "__main__":
    main()
