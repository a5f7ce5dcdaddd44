"""One run of compare_methods.py: a method narrows a classifier, which is measured, fine-tuned and tested."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel, set_seed

from peft_fusion import FusionConfig, calibrate, fidelity, tune_layers

from .classifiers import accuracy, tokenize
from .command_line import layer_indices
from .fine_tuning import fine_tune
from .grid_methods import FULL_WIDTH, METHODS, Method
from .load_models import classifier_path, load_classifier, load_tokenizer
from .text_tasks import load_text_classification
from .trainable_parts import attention, head, with_lora

LORA_RATE = 1e-3  # every other row has the learning rate that suits the full model
BATCH = 32
TUNING_STEPS = {"hidden_states": 100, "ffn": 500}
CALIBRATION_SEQUENCES = 512


@dataclass(frozen=True)
class Setting:
    """What all rows share.

    Args:
        model: Hub id or local path; None: the default MiniLM.
        dataset: see `text_tasks.load_text_classification`.
        steps: of fine-tuning, on as many batches of training examples; None: `epochs` over all of them.
        epochs: see `steps`.
        test: most test examples; None for all.
        layers: whose FFNs are narrowed, in words (`command_line.layer_indices`).
        learning_rate: of every row but LoRA's.
        sequences: held-out ones that the kernels are compared on.
        compared_seed: the seed whose runs are compared with the original before they are fine-tuned.
        training: further fields of `TrainingArguments`.
    """

    model: str | None
    dataset: str
    steps: int | None
    epochs: int | None
    test: int | None
    layers: str
    learning_rate: float
    sequences: int
    compared_seed: int
    training: dict[str, Any]


def compare(name: str, ratio: float, seed: int, setting: Setting) -> dict[str, Any]:
    """One run.

    Args:
        name: a key of `grid_methods.METHODS`.
        ratio: fraction of each FFN's neurons that is kept.
        seed: of the head, the sampled examples, their order and the clustering.
        setting: what all runs share.

    Returns:
        Its figures, by column. The errors and kernels are those before fine-tuning, on test sentences.
    """
    method = METHODS[name]
    drawn = setting.steps and setting.steps * BATCH
    task = load_text_classification(setting.dataset).sample(train=drawn, test=setting.test, seed=seed)
    steps = setting.steps or math.ceil((setting.epochs or 1) * len(task.train) / BATCH)
    path = classifier_path(setting.model)
    tokenizer = load_tokenizer(path)
    train, test = (tokenize(tokenizer, examples) for examples in (task.train, task.test))
    collator = DataCollatorWithPadding(tokenizer)
    batches = DataLoader(train, BATCH, collate_fn=collator)  # type: ignore[arg-type]
    held_out = DataLoader(test[: setting.sequences], 16, collate_fn=collator)  # type: ignore[arg-type]
    model = load_classifier(path, len(task.labels), seed).to("cuda" if torch.cuda.is_available() else "cpu")
    set_seed(seed)
    started = time.perf_counter()
    trained = prepare(model, method, ratio, seed, setting, batches)
    figures: dict[str, Any] = {"seconds to fuse": time.perf_counter() - started}
    if method.tuned:
        figures |= tune(trained, method.tuned, batches, held_out, setting)
    if name not in FULL_WIDTH and seed == setting.compared_seed:
        figures |= closeness(trained, held_out, setting)
    trainer, seconds = fine_tune(
        trained,
        train,
        collator,
        title=name,
        steps=steps,
        batch_size=BATCH,
        learning_rate=LORA_RATE if method.trains == "lora" else setting.learning_rate,
        settings={"seed": seed, **setting.training},
    )
    trainable = sum(p.numel() for p in trained.parameters() if p.requires_grad) / 1e6
    figures |= {"seconds a step": seconds, "M parameters train": trainable, "examples": len(test)}
    return figures | {"accuracy": accuracy(trainer, test), "majority": task.majority()}


def prepare(
    model: PreTrainedModel,
    method: Method,
    ratio: float,
    seed: int,
    setting: Setting,
    batches: Iterable[dict[str, Any]],
) -> PreTrainedModel | PeftModel:
    """The model to train, with what is to train requiring gradients."""
    layers = layer_indices(setting.layers, model.config.num_hidden_layers)
    if method.settings is not None:
        others = attention(model) if method.trains == "attention" else []
        where = {"layers_to_transform": layers, "modules_to_save": head(model) + others}
        config = FusionConfig(task_type="SEQ_CLS", ratio=ratio, seed=seed, **where, **method.settings)
        if method.calibrated:
            calibrate(model, config, batches, sequences=CALIBRATION_SEQUENCES)
        return get_peft_model(model, config)
    return with_lora(model, "SEQ_CLS") if method.trains == "lora" else model


def tune(
    model: PeftModel,
    objective: str,
    batches: Iterable[dict[str, Any]],
    held_out: Iterable[dict[str, Any]],
    setting: Setting,
) -> dict[str, float]:
    """`tune_layers`, and what it does to the hidden states of sequences that it has not seen."""
    bf16 = bool(setting.training.get("bf16"))
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=bf16 and not torch.cuda.is_available())
    layerwise = {"learning_rate": setting.learning_rate, "accelerator": accelerator}
    before = fidelity(model, held_out, sequences=1).hidden_states.relative
    started = time.perf_counter()
    tune_layers(
        model,
        batches,
        objective=objective,
        steps=min(TUNING_STEPS[objective], 10 * (setting.steps or TUNING_STEPS[objective])),
        **layerwise if objective == "hidden_states" else {},
    )
    seconds = time.perf_counter() - started
    after = fidelity(model, held_out, sequences=1).hidden_states.relative
    return {"hidden-state error, tuned / before": after / before, "seconds to tune": seconds}


def closeness(model: PeftModel, held_out: Iterable[dict[str, Any]], setting: Setting) -> dict[str, float]:
    """How near the narrow model is to the original, in outputs and in tangent kernels."""
    report = fidelity(model, held_out, sequences=setting.sequences)
    return {
        "FFN output error": sum(ffn.output.relative for ffn in report.ffns) / len(report.ffns),
        "hidden-state error": report.hidden_states.relative,
        "Adam-NTK error": report.ntk.adam.relative,
        "Adam-NTK cosine": report.ntk.adam.cosine,
    }
