"""Fine-tuning with the plain `Trainer`, quiet but for a few lines, with the time of every step taken."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

WARM_UP_STEPS = 5  # the first steps pay for allocations and are not timed
REPORTS = 4  # lines of progress


class StepTimer(TrainerCallback):
    """Takes the time of each step (forward, backward, optimizer); prints a line of progress now and then."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(self._now() - self.started)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            print(
                f"  {self.title}: step {state.global_step}/{state.max_steps}, loss {float(logs['loss']):.3f}",
                flush=True,
            )

    def median(self) -> float:
        return statistics.median(self.seconds[min(WARM_UP_STEPS, len(self.seconds) // 2) :])

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def be_quiet() -> None:
    """Leaves the console to the example's own lines."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def fine_tune(
    model: torch.nn.Module,
    train: Sequence[dict[str, Any]],
    collator: Callable[[list], dict],
    *,
    title: str,
    steps: int,
    batch_size: int,
    learning_rate: float,
    settings: Mapping[str, Any] | None = None,
) -> tuple[Trainer, float]:
    """Trains `model` in place.

    Args:
        train: tokenised examples.
        collator: makes a batch of them.
        title: what the lines of progress start with.
        settings: further fields of `TrainingArguments`; they win over those set here.

    Returns:
        The `Trainer`, for predictions, and the median time of a step in seconds.
    """
    fields: dict[str, Any] = {
        "output_dir": tempfile.gettempdir(),  # nothing is written
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 4 * batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": max(1, steps // 10),
        "weight_decay": 0.01,
        "logging_steps": math.ceil(steps / REPORTS),
        "label_names": ["labels"],
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    arguments = TrainingArguments(**fields | dict(settings or {}))
    timer = StepTimer(title)
    trainer = Trainer(model, arguments, train_dataset=train, data_collator=collator, callbacks=[timer])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer, timer.median()
