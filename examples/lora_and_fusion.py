"""LoRA together with MLP Fusion: the five ways, each trained, saved, reloaded and merged.

    python examples/lora_and_fusion.py             # minutes on two CPU cores
    python examples/lora_and_fusion.py --smoke     # the same path in less than a minute; its figures mean nothing

mixed      PEFT's mixed model: get_peft_model(model, FusionConfig(...), mixed=True), then add_adapter
injected   inject_adapter_in_model(FusionConfig(...), model), then get_peft_model(model, LoraConfig(...))
native     transformers' own add_adapter, twice, then set_adapter([...])
fuse       fuse(model, config) for good, then LoRA on the plain narrow model, its FFNs included
frozen     fused FFNs that stay as they are, LoRA on the attention
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common.classifiers import accuracy, logits, tokenize
from common.command_line import example_parser, output_folder, run, write_json
from common.fine_tuning import be_quiet, fine_tune
from common.load_models import classifier_path, load_classifier, load_tokenizer
from common.reporting import text_table
from common.text_tasks import load_text_classification
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import DataCollatorWithPadding, PreTrainedModel

from peft_fusion import FusionConfig, fuse
from peft_fusion.tuner.mixed import load_mixed, save_mixed  # not public: PEFT itself cannot save a mixed model

BATCH_SIZE = 16
STEPS, SMOKE_STEPS = 100, 2
TEST_EXAMPLES, SMOKE_TEST_EXAMPLES = 2000, 32
TOLERANCE = 1e-4  # of the largest logit
LEARNING_RATE = 1e-3


def attention(**kwargs: Any) -> LoraConfig:
    """LoRA on the query, key and value projections of BERT's or Llama's attention."""
    return LoraConfig(r=16, lora_alpha=32, target_modules=r".*\.(query|key|value|q_proj|k_proj|v_proj)", **kwargs)


def mixed(model: PreTrainedModel, ratio: float) -> torch.nn.Module:
    """The classifier trains with one of the two adapters; a mixed model does not guess it from the task."""
    together = get_peft_model(model, FusionConfig(ratio=ratio), adapter_name="ffn", mixed=True)
    together.add_adapter("attn", attention(modules_to_save=["classifier"]))
    together.set_adapter(["ffn", "attn"])
    return together


def injected(model: PreTrainedModel, ratio: float) -> torch.nn.Module:
    inject_adapter_in_model(FusionConfig(ratio=ratio), model, "ffn")
    return get_peft_model(model, attention(task_type="SEQ_CLS"), adapter_name="attn")


def native(model: PreTrainedModel, ratio: float) -> torch.nn.Module:
    """The classifier stays as it is: transformers can activate a trained one for a single adapter only."""
    model.add_adapter(FusionConfig(ratio=ratio), "ffn")
    model.add_adapter(attention(), "attn")
    model.set_adapter(["ffn", "attn"])
    return model


def fuse_for_good(model: PreTrainedModel, ratio: float) -> torch.nn.Module:
    narrow = fuse(model, FusionConfig(ratio=ratio))
    return get_peft_model(narrow, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS"))


def frozen(model: PreTrainedModel, ratio: float) -> torch.nn.Module:
    together = mixed(model, ratio)
    together.base_model.set_requires_grad("ffn", False)
    return together


WAYS: dict[str, Callable[[PreTrainedModel, float], torch.nn.Module]] = {
    "mixed": mixed,
    "injected": injected,
    "native": native,
    "fuse": fuse_for_good,
    "frozen": frozen,
}


def main() -> None:
    options = parse_arguments()
    be_quiet()
    output = output_folder(options)
    task = load_text_classification(options.dataset).sample(train=options.steps * BATCH_SIZE, test=options.max_test)
    rows = [row(way, task, options, output / way) for way in options.ways]
    columns = list(rows[0])
    print("\n" + text_table(columns, [[str(r[column]) for column in columns] for r in rows]))
    print(f"what was saved is in {output}")
    write_json(options, {"rows": rows})


def parse_arguments() -> argparse.Namespace:
    model = "Hub id or local path of an encoder (default: MiniLM-L6 from a pip package)"
    parser = example_parser(__doc__, model=model, ratio=0.25, steps=STEPS)
    parser.add_argument("--dataset", default="papers", help="see quickstart.py (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="(default: all)")
    options = parser.parse_args()
    options.max_test = TEST_EXAMPLES
    if options.smoke:
        options.steps, options.max_test = SMOKE_STEPS, SMOKE_TEST_EXAMPLES
    return options


def row(way: str, task: Any, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trains one way, saves it, reloads it and merges it; ends the example where outputs differ."""
    path = classifier_path(options.model)
    tokenizer, classes = load_tokenizer(path), len(task.labels)
    model = WAYS[way](load_classifier(path, classes), options.ratio)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trainer, _ = fine_tune(
        model,
        tokenize(tokenizer, task.train),
        DataCollatorWithPadding(tokenizer),
        title=way,
        steps=options.steps,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
    )
    score = accuracy(trainer, tokenize(tokenizer, task.test))
    inputs = [[text, pair] for text, pair, _ in task.test[:8]]
    expected = logits(model, tokenizer, inputs)
    reloaded = save_and_reload(way, model, lambda: load_classifier(path, classes), folder)
    check(f"{way}, reloaded", logits(reloaded, tokenizer, inputs), expected)
    plain = reloaded.merge_and_unload()
    plain.save_pretrained(folder / "merged")
    stock = load_classifier(str(folder / "merged"), classes)
    check(f"{way}, merged and loaded by stock transformers", logits(stock, tokenizer, inputs), expected)
    parameters = sum(p.numel() for p in stock.parameters())
    return {"way": way, "trainable": trainable, "merged parameters": parameters, "accuracy": round(score, 3)}


def save_and_reload(
    way: str, model: torch.nn.Module, base: Callable[[], PreTrainedModel], folder: Path
) -> torch.nn.Module:
    """Every adapter in one call; where the FFNs were fused for good, the narrow model is the adapter's base."""
    if way != "fuse":
        save_mixed(model, folder / "adapters")
        return load_mixed(base(), folder / "adapters")
    model.save_pretrained(folder / "adapter")
    model.unload().save_pretrained(folder / "narrow")
    return PeftModel.from_pretrained(
        load_classifier(str(folder / "narrow"), model.config.num_labels), folder / "adapter"
    )


def check(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= TOLERANCE * scale:
        raise SystemExit(f"{what}: outputs DIFFER: max difference {difference:.1e}, logits up to {scale:.2f}")
    print(f"  {what}: outputs agree (max difference {difference:.1e})", flush=True)


if __name__ == "__main__":
    run(main)
