"""How good narrow FFNs are, on real weights and held-out text: fusion, its variants, and honest baselines.

    python benchmarks/quality.py smollm2                        perplexity of SmolLM2-135M, without any training
    python benchmarks/quality.py minilm --seeds 0 1 2           accuracy of MiniLM-L6 after fine-tuning
    python benchmarks/quality.py smollm2 --tune --json out.json
    python benchmarks/quality.py minilm --smoke                 random, small, seconds

SmolLM2: the last 16 of 30 layers are narrowed and nothing is trained; perplexity on held-out scientific papers. The
calibration text is of another domain (WordNet's glosses), or what the model samples itself (--text own).

MiniLM: all layers are narrowed, then FFNs and head are fine-tuned at the learning rate that suits the full model, on
sentences of papers by their role. Every pruning row has the same calibration text, refit and scale as the fusion row
beside it. A finished row is read from --json and not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, default_data_collator, set_seed

from peft_fusion import FusionConfig, calibrate, fidelity, tune_layers

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import causal_lm  # noqa: E402
import train_row  # noqa: E402
from data import WORDNET_NOUNS, load_text_classification, load_texts, parse_wordnet  # noqa: E402
from measure import text_table  # noqa: E402
from models import classifier_path, load_causal_lm, load_classifier, load_tokenizer  # noqa: E402
from training import be_quiet, fine_tune  # noqa: E402

LAYERS = list(range(14, 30))
LEARNING_RATE = 1e-4
TRAINING_STEPS, BATCH = 150, 32

# row -> (settings of the configuration, or None for no fusion; whether it is calibrated)
VARIANTS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "original": (None, False),
    "fusion as published": ({}, False),
    "clustering": ({"method": "clustering"}, False),
    "pruning by norms": ({"method": "pruning"}, False),
    "random narrow FFNs": ({"init_weights": False}, False),
    "pruning by saliency, no refit": ({"method": "pruning", "refit": "none", "scale": "none"}, True),
    "pruning by saliency, refit": ({"method": "pruning", "scale": "none"}, True),
    "pruning by saliency, refit, scale": ({"method": "pruning"}, True),
    "fusion, centroids, refit": ({"representative": "centroid", "scale": "counts"}, True),
    "fusion": ({}, True),
}


def main() -> None:
    options = parse_arguments()
    be_quiet()
    done = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    rows = smollm2(options, done) if options.task == "smollm2" else minilm(options, done)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print("\n" + text_table(columns, [[show(row.get(column)) for column in columns] for row in rows]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("smollm2", "minilm"))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--text", choices=("other", "own"), default="other", help="what SmolLM2 is calibrated on")
    parser.add_argument("--tune", action="store_true", help="also after `tune_layers`, for the calibrated rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep finished rows here")
    parser.add_argument("--smoke", action="store_true", help="few steps and examples: does everything work?")
    return parser.parse_args()


def each(
    options: argparse.Namespace, done: dict[str, Any], key: str, row: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """A row from the file of finished ones, or computed, printed and added to it."""
    if key not in done:
        done[key] = row()
        if options.json:
            options.json.write_text(json.dumps(done, indent=1) + "\n")
    print(key, {name: show(value) for name, value in done[key].items()}, flush=True)
    return done[key]


def smollm2(options: argparse.Namespace, done: dict[str, Any]) -> list[dict[str, Any]]:
    """Perplexity, error of the FFNs' outputs and time to fuse, by variant."""
    model, tokenizer = load_causal_lm(None)
    size = 4 if options.smoke else 48
    held_out = causal_lm.blocks(tokenizer, load_texts()[1], 512)[:size]
    text = causal_lm.blocks(tokenizer, other_text(), 256)[: 8 if options.smoke else 128]
    batches = DataLoader(text, 8, collate_fn=default_data_collator)
    statistics_kept: dict[str, Any] = {}

    def row(name: str, ratio: float) -> dict[str, Any]:
        settings, calibrated = VARIANTS[name]
        result: dict[str, Any] = {"variant": name, "ratio": ratio}
        if settings is None:
            return result | {"perplexity": causal_lm.perplexity(model, held_out)}
        config = FusionConfig(ratio=ratio, layers_to_transform=LAYERS, **settings)
        if calibrated:
            share_calibration(model, config, None if options.text == "own" else batches, statistics_kept, options)
        started = time.perf_counter()
        fused = get_peft_model(model, config)
        result["seconds to fuse"] = time.perf_counter() - started
        result["perplexity"] = causal_lm.perplexity(fused, held_out)
        if options.tune and calibrated:
            started = time.perf_counter()
            errors = tune_layers(fused, batches, steps=5 if options.smoke else 300)
            result["error, tuned / before"] = statistics.mean(after / before for before, after in errors.values())
            result["seconds to tune"] = time.perf_counter() - started
            result["perplexity, tuned"] = causal_lm.perplexity(fused, held_out)
        fused.unload()
        return result

    ratios = options.ratios[:1] if options.smoke else options.ratios
    names = [(name, ratio) for ratio in ratios for name in options.variants]
    prefix = f"smollm2 {options.text}"
    return [each(options, done, f"{prefix} {n} {r}", lambda n=n, r=r: row(n, r)) for n, r in names]  # type: ignore[misc]


def share_calibration(
    model: nn.Module, config: FusionConfig, batches: DataLoader | None, kept: dict[str, Any], options: Any
) -> None:
    """Calibrates once and gives every variant the same statistics."""
    if not kept:
        started = time.perf_counter()
        calibrate(model, config, batches, sequences=8 if options.smoke else 128, length=32 if options.smoke else 256)
        kept["found"] = model._mlp_fusion_calibration
        print(f"calibrated on {kept['found'].source} in {time.perf_counter() - started:.0f} s", flush=True)
    model._mlp_fusion_calibration = kept["found"]


def other_text() -> list[str]:
    """Calibration text that is not from papers: WordNet's glosses, forty a document."""
    if WORDNET_NOUNS.is_file():
        pairs = parse_wordnet(WORDNET_NOUNS.read_text(encoding="utf-8").splitlines())
        return ["\n".join(gloss for gloss, _ in pairs[start : start + 40]) for start in range(0, 16000, 40)]
    raise SystemExit("Calibration text of another domain: apt install wordnet-base, or use --text own.")


def minilm(options: argparse.Namespace, done: dict[str, Any]) -> list[dict[str, Any]]:
    """Accuracy after fine-tuning (mean and spread over seeds) and Adam-NTK error on held-out sentences."""
    rows = []
    for ratio in options.ratios[:1] if options.smoke else options.ratios:
        for name in options.variants:
            seeds = options.seeds[:1] if options.smoke else options.seeds
            keys = [f"minilm {name} {ratio} seed {seed}" for seed in seeds]
            runs = [
                each(options, done, key, lambda s=seed, n=name, r=ratio: fine_tuned(n, r, s, options))  # type: ignore[misc]
                for key, seed in zip(keys, seeds, strict=True)
            ]
            accuracies = [run["accuracy"] for run in runs]
            spread = statistics.stdev(accuracies) if len(accuracies) > 1 else None
            figures = {"variant": name, "ratio": ratio, "accuracy": statistics.mean(accuracies), "spread": spread}
            rows.append(figures | {k: v for k, v in runs[0].items() if k != "accuracy"})
    return rows


def fine_tuned(name: str, ratio: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run: narrow, compare with the original, fine-tune FFNs and head, test."""
    steps, test = (3, 64) if options.smoke else (TRAINING_STEPS, None)
    task = load_text_classification().sample(train=steps * BATCH, test=test, seed=seed)
    path = classifier_path(None)
    tokenizer, model = load_tokenizer(path), load_classifier(path, len(task.labels), seed)
    train, collator = train_row.tokenize(tokenizer, task.train), DataCollatorWithPadding(tokenizer)
    settings, calibrated = VARIANTS[name]
    result: dict[str, Any] = {"examples": len(task.test)}
    if settings is None:
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in parameter_name for part in ("intermediate", "layer.", "classifier")))
            if "attention" in parameter_name or "LayerNorm" in parameter_name:
                parameter.requires_grad_(False)
        trained = model
    else:
        config = FusionConfig(task_type="SEQ_CLS", ratio=ratio, seed=seed, **settings)
        if calibrated:
            calibrate(model, config, DataLoader(train, BATCH, collate_fn=collator), sequences=512)
        trained = get_peft_model(model, config)
        held_out = DataLoader(train_row.tokenize(tokenizer, task.test[:64]), 16, collate_fn=collator)
        report = fidelity(trained, held_out, sentences=8 if options.smoke else 64)
        result["output error"] = statistics.mean(ffn.output.relative for ffn in report.ffns)
        result["Adam-NTK error"], result["cosine"] = report.ntk.adam.relative, report.ntk.adam.cosine
    set_seed(seed)
    trainer, _ = fine_tune(
        trained, train, collator, title=name, steps=steps, batch_size=BATCH, learning_rate=LEARNING_RATE
    )
    return result | {"accuracy": train_row.accuracy(trainer, train_row.tokenize(tokenizer, task.test))}


def show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
