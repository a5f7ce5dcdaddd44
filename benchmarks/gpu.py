"""What a GPU does with all of it, in one command; it runs on a CPU as well.

    python benchmarks/gpu.py                  a layer of Llama-7B's shape, and a model of SmolLM2-135M's
    python benchmarks/gpu.py --smoke          small shapes, seconds; its figures mean nothing
    python benchmarks/gpu.py --json out.json  also as JSON

- clustering: the weight kernel of an FFN, and kernel k-means of its neurons to a quarter;
- calibrated fusion of that FFN to a quarter: statistics of 8192 tokens, then the narrow FFN;
- a training step in bf16 autocast, beside a model that was narrow from the start and beside LoRA, and its peak memory;
- generation: tokens a second of the original and of the merged model, 16 sequences at once.

The FFN's weights are random and its inputs correlated, for only time and memory are measured. Peak memory is what
tensors took on the GPU; on a CPU there is none. Times are the fewest seconds of some runs, the first not counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from shapes import SMOKE, VOCABULARY, batch, fused, llama, native, trainable, training_step
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from peft_fusion.fusing.calibrated import fuse_calibrated
from peft_fusion.fusing.cluster.kmeans import kernel_kmeans
from peft_fusion.fusing.kernels import weight_kernel
from peft_fusion.fusing.recipe import Recipe
from peft_fusion.fusing.settle import settle
from peft_fusion.fusing.statistics import FFNStatistics
from peft_fusion.fusing.weights import FFNWeights

RATIO = 0.25
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Figures = dict[str, float]


@dataclass(frozen=True)
class Size:
    """What is measured.

    Args:
        dim: of the FFN's inputs and outputs.
        width: its neurons.
        tokens: that it is calibrated on.
        model: of the language model, for `shapes`.
        length: tokens of a sequence in training.
        made: tokens that are generated.
    """

    dim: int = 4096
    width: int = 11008
    tokens: int = 8192
    model: tuple[tuple[str, int], ...] = (("layers", 30),)
    length: int = 256
    made: int = 64
    repeats: int = 3


SMALL = Size(64, 160, 256, tuple(SMOKE.items()), 16, 4, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--smoke", action="store_true", help="small shapes: does it work?")
    options = parser.parse_args()
    size = SMALL if options.smoke else Size()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or "CPU"
    print(f"{name}, torch {torch.__version__}")
    report: dict[str, Any] = {"device": name, "torch": torch.__version__}
    for part in (clustering, calibrated_fusion, training, generation):
        report[part.__name__] = found = part(size)
        for row, figures in found.items():
            print(
                f"{part.__name__:18} {row:14}" + "".join(f"  {key} {v:.4g}" for key, v in figures.items()), flush=True
            )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def clustering(size: Size) -> dict[str, Figures]:
    """The paper's fusion of one FFN: products of all rows, then clusters of them."""
    weights = random_ffn(size)
    gram, kernel = timed(lambda: weight_kernel(weights), size.repeats)
    _, clusters = timed(lambda: kernel_kmeans(gram, round(RATIO * size.width)), size.repeats)
    return {"kernel": kernel, "k-means": clusters}


def calibrated_fusion(size: Size) -> dict[str, Figures]:
    """Fusion of one FFN by its outputs: what a pass over the data adds up, and what is made of it."""
    weights, activation = random_ffn(size), SiLUActivation()
    inputs = correlated_inputs(size)
    recipe = settle(Recipe(), "random inputs", gradients=False)

    def collected() -> FFNStatistics:
        statistics = FFNStatistics(size.width, size.dim, DEVICE)
        for x in inputs[size.tokens // 4 :].split(1024):
            gate, up = (x @ w.T for w in weights.in_weights)
            statistics.add(activation(gate) * up)
        statistics.hold_out(inputs[: size.tokens // 4])
        return statistics

    statistics, collecting = timed(collected, size.repeats)
    width = round(RATIO * size.width)
    _, fusing = timed(lambda: fuse_calibrated(weights, width, statistics, activation, recipe), size.repeats)
    return {"statistics": collecting, "narrow FFN": fusing}


def training(size: Size) -> dict[str, Figures]:
    """A step, forward to optimizer, of models that train about as much."""
    sizes = dict(size.model)
    inputs = batch(8, size.length, sizes.get("vocabulary", VOCABULARY))
    makers: dict[str, Callable[[], nn.Module]] = {
        "fused, keep": lambda: fused(RATIO, **sizes),
        "fused, discard": lambda: fused(RATIO, base_weights="discard", **sizes),
        "native": lambda: native(RATIO, **sizes),
        "LoRA": lambda: get_peft_model(llama(**sizes), LoraConfig(r=16, target_modules="all-linear")),
    }
    return {name: of_training(make(), inputs, size.repeats) for name, make in makers.items()}


def of_training(model: nn.Module, inputs: dict[str, Tensor], repeats: int) -> Figures:
    model.to(DEVICE)
    on_device = {name: value.to(DEVICE) for name, value in inputs.items()}
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-4)
    return timed(lambda: training_step(model, optimizer, on_device, "bf16"), repeats)[1]


def generation(size: Size) -> dict[str, Figures]:
    """Greedy tokens of the original, and of what it is merged to."""
    sizes = dict(size.model)
    models = {"original": llama(**sizes), "merged": fused(RATIO, **sizes).merge_and_unload()}  # type: ignore[operator]
    prompt = batch(16, size.length // 4, sizes.get("vocabulary", VOCABULARY))["input_ids"].to(DEVICE)
    found = {}
    for name, model in models.items():
        model.to(DEVICE, torch.bfloat16).eval()
        settings: dict[str, Any] = {"max_new_tokens": size.made, "min_new_tokens": size.made, "do_sample": False}
        settings |= {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
        _, figures = timed(lambda m=model, s=settings: m.generate(prompt, **s), size.repeats)  # type: ignore[misc]
        found[name] = figures | {"tokens/s": 16 * size.made / figures["seconds"]}
    return found


def random_ffn(size: Size) -> FFNWeights:
    """A gated FFN whose outputs are about as large as its inputs."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def drawn(rows: int, columns: int, scale: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=DEVICE).mul_(scale)

    ins = tuple(drawn(size.width, size.dim, size.dim**-0.5) for _ in range(2))
    return FFNWeights(ins, (None, None), drawn(size.width, size.dim, size.width**-0.5), None)


def correlated_inputs(size: Size) -> Tensor:
    """Inputs (tokens, dim), most of whose variance lies in an eighth of the dimensions."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    few = torch.randn(size.tokens, size.dim // 8, generator=generator, device=DEVICE)
    mixing = torch.randn(size.dim // 8, size.dim, generator=generator, device=DEVICE) * (size.dim // 8) ** -0.5
    noise = torch.randn(size.tokens, size.dim, generator=generator, device=DEVICE)
    return few @ mixing + 0.3 * noise


def timed(work: Callable[[], Any], repeats: int) -> tuple[Any, Figures]:
    """What some work gives, its fewest seconds, and on a GPU the most memory that it took."""
    result, seconds = work(), []
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        result = work()
        wait()
        seconds.append(time.perf_counter() - started)
    figures = {"seconds": min(seconds)}
    if DEVICE.type == "cuda":
        figures["peak MB"] = torch.cuda.max_memory_allocated() / 1e6
    return result, figures


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
