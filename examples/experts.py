"""A mixture of experts made half as large: by narrowing its experts in several ways, and by removing half of them.

    python examples/experts.py                   SmolLM2-135M, its last 8 layers upcycled to 4 experts
    python examples/experts.py --steps 300 --block 256 --held-out 48   as long as you have time for
    python examples/experts.py --model google/switch-base-16           or Mixtral, Qwen3-MoE, a local path
    python examples/experts.py --smoke           the same path in a minute; its figures mean nothing

Upcycled experts start as copies of one another, so they are first trained on text, with their routers, until they
differ. Then, all of that one model: experts narrowed to half by calibrated fusion; by pruning their neurons of least
norm, no refit ("naive"); by pruning those of least saliency, with the same refit; by fusing their weights alone; and
half of the experts removed by REAP's saliency, which leaves as many parameters. The first, second and last are then
distilled from the trained model, and then fine-tuned on the text; routers stay frozen. Experts that were copies a short
while ago are still much alike, which favours removing some: the distance between them is printed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

from common.command_line import example_parser, positive, rate, run, write_json
from common.errors import InputError
from common.fine_tuning import be_quiet, fine_tune
from common.mixtures import difference, load_mixture, remove_experts, train_experts_alone
from common.reporting import text_table
from common.running_text import Block, blocks, load_texts, perplexity
from common.text_tasks import draw
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainingArguments, default_data_collator

from peft_fusion import FusionConfig, calibrate, distill
from peft_fusion.ffn import find_experts

BATCH = 8
FUSION, NAIVE, REMOVED = "calibrated fusion", "naive width pruning", "half of the experts removed"
RECOVERED = (FUSION, NAIVE, REMOVED)


def main() -> None:
    options = parse_arguments()
    be_quiet()
    figures = Mixture(options).figures()
    rows = [[name, *(f"{found[s]:.2f}" if s in found else "" for s in STAGES)] for name, found in figures.items()]
    print("\n" + text_table(["perplexity", *STAGES], rows))
    write_json(options, figures)


STAGES = ("at once", "distilled", "fine-tuned")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    model = "Hub id or local path of a mixture of experts (default: SmolLM2-135M, upcycled)"
    parser = example_parser(__doc__, model=model, ratio=0.5, steps=100)
    add = parser.add_argument
    add("--text", default="papers", help="papers (default, from a pip package), a text file, Hub id or local path")
    add("--layers", type=positive, default=8, help="the last layers that are upcycled (default: %(default)s)")
    add("--block", type=positive, default=128, help="tokens in an example (default: %(default)s)")
    add("--held-out", type=positive, default=32, help="blocks that perplexity is taken on (default: %(default)s)")
    add("--calibration", type=positive, default=128, help="blocks to calibrate on (default: %(default)s)")
    add("--recovery", type=positive, default=32, help="steps of distilling, and of fine-tuning (default: %(default)s)")
    add(
        "--upcycling-rate", type=rate, default=1e-3, help="learning rate of the upcycled experts (default: %(default)s)"
    )
    add("--learning-rate", type=rate, default=2e-4, help="of distilling and fine-tuning (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.steps = options.recovery = options.layers = 1
        options.block, options.held_out, options.calibration = 32, 2, 16
    return options


class Mixture:
    """One mixture of experts, what it is narrowed to, and what each of these reaches."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model, tokenizer = load_mixture(options.model, options.layers, 2 if options.smoke else None)
        self.encodes = bool(self.model.config.is_encoder_decoder)
        some = 8 if options.smoke else None
        texts = [part[:some] for part in load_texts(options.text)]
        train, held_out = (self._examples(blocks(tokenizer, part, options.block)) for part in texts)
        if not (train and held_out):
            raise InputError(f"--text {options.text}: too short for blocks of {options.block} tokens")
        self.train = draw(train, BATCH * (options.steps + options.recovery) + options.calibration)
        self.held_out = draw(held_out, options.held_out)
        self.routed = bool(find_experts(self.model))  # in 3-D parameters; Switch has a module for each

    def _examples(self, found: list[Block]) -> list[Block]:
        """Blocks as the model takes them: an encoder-decoder reads the first half and continues with the second."""
        if not self.encodes:
            return found
        half = self.options.block // 2
        return [{"input_ids": b["input_ids"][:half], "labels": b["labels"][half:]} for b in found]

    def figures(self) -> dict[str, dict[str, float]]:
        """Row -> stage -> perplexity."""
        rows: dict[str, dict[str, float]] = {}
        if self.options.model is None:
            self._note(rows, "SmolLM2-135M, upcycled", "at once", self.model)
            self._train_apart()
        self._note(rows, "the mixture of experts", "at once", self.model)
        for name, make in self._ways().items():
            narrow = make(copy.deepcopy(self.model))
            self._note(rows, name, "at once", narrow)
            if name in RECOVERED:
                self._recover(rows, name, narrow)
        return rows

    def _ways(self) -> dict[str, Callable[[PreTrainedModel], nn.Module]]:
        def removed(model: PreTrainedModel) -> nn.Module:
            return remove_experts(model, self._calibration(), self.options.ratio)

        ways: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
            FUSION: lambda model: self._narrowed(model, True),
            NAIVE: lambda model: self._narrowed(model, False, method="pruning"),
            "width pruning, saliency and refit": lambda model: self._narrowed(model, True, method="pruning"),
            "fusion by weights alone": lambda model: self._narrowed(model, False),
        }
        return ways | ({REMOVED: removed} if self.routed else {})

    def _narrowed(self, model: PreTrainedModel, calibrated: bool, **settings: str) -> nn.Module:
        targets = ["experts"] if self.routed else None
        config = FusionConfig(ratio=self.options.ratio, target_modules=targets, **settings)  # type: ignore[arg-type]
        if calibrated:
            calibrate(model, config, self._calibration())
        return get_peft_model(model, config)

    def _calibration(self) -> DataLoader:
        part = self.train[: self.options.calibration]
        return DataLoader(part, BATCH, collate_fn=default_data_collator)  # type: ignore[arg-type]

    def _train_apart(self) -> None:
        """Trains upcycled experts and their routers; a loss that balances their loads keeps all of them in use."""
        train_experts_alone(self.model, routers=True)
        self.model.config.output_router_logits = True
        fine_tune(
            self.model,
            self.train[: BATCH * self.options.steps],
            default_data_collator,
            title="upcycling",
            steps=self.options.steps,
            batch_size=BATCH,
            learning_rate=self.options.upcycling_rate,
        )
        self.model.config.output_router_logits = False
        self.model.requires_grad_(False)
        print(f"experts differ from the mean of their layer by {difference(self.model):.3f} of its size", flush=True)

    def _recover(self, rows: dict[str, dict[str, float]], name: str, narrow: nn.Module) -> None:
        """Distils a small model from the whole one, then fine-tunes it; of either kind only the experts train."""
        options, data = self.options, self.train[-BATCH * self.options.recovery :]
        if name == REMOVED:
            assert isinstance(narrow, PreTrainedModel)
            train_experts_alone(narrow, routers=False)
        arguments = TrainingArguments(
            "unused",
            max_steps=options.recovery,
            per_device_train_batch_size=BATCH,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        batches = DataLoader(data, BATCH, collate_fn=default_data_collator)  # type: ignore[arg-type]
        distill(narrow, batches, teacher=self.model, train="adapters", args=arguments)
        self._note(rows, name, "distilled", narrow)
        fine_tune(
            narrow,
            data,
            default_data_collator,
            title=f"{name}: fine-tuning",
            steps=options.recovery,
            batch_size=BATCH,
            learning_rate=options.learning_rate,
        )
        self._note(rows, name, "fine-tuned", narrow)

    def _note(self, rows: dict[str, dict[str, float]], name: str, stage: str, model: nn.Module) -> None:
        found = perplexity(model, self.held_out)
        rows.setdefault(name, {})[stage] = found
        print(f"{name}, {stage}: perplexity {found:.2f}", flush=True)


if __name__ == "__main__":
    run(main)
