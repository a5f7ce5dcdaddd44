"""How good narrow FFNs are, on real weights and held-out text: fusion, its variants, and honest baselines.

    python benchmarks/quality.py smollm2 --tune --json smollm2.json --plot smollm2.png   about an hour on two cores
    python benchmarks/quality.py smollm2 --text own --variants original fusion           calibrated without data
    python benchmarks/quality.py smollm2 --text own --layers all --ratios .729 --variants "fusion, budget" \\
        --distill 524288                                                                 20 % removed, without data
    python benchmarks/quality.py minilm --results minilm      examples/compare_methods.py: accuracy after fine-tuning
    python benchmarks/quality.py smollm2 --smoke              (or minilm) small; its figures mean nothing

SmolLM2-135M: the last 16 of 30 layers (`--layers last`) are narrowed, or all; half of 16 FFNs is as much as .7333 of
all, 20 % of the blocks' parameters. Nothing is trained unless `--tune` or `--distill` says so. Perplexity and KL from
the original, in nats a token, on held-out scientific papers; output error and Adam-NTK error on other blocks of them.
The calibration text is of another domain (`--text other`: WordNet's glosses), the papers of the training split
(`--text papers`) or what the model samples itself (`--text own`); `--tune` takes more of the text. Every pruning row
has the text, refit and scale of the fusion row beside it; in "fisher kernel" its saliency is also measured in the
metric that fusion uses. A finished row is read from `--json` and not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainingArguments, default_data_collator

from peft_fusion import FusionConfig, calibrate, distill, fidelity, tune_layers
from peft_fusion.distill.setting import LEARNING_RATE
from peft_fusion.fusing.precision import has_fast_bfloat16
from peft_fusion.observe.divergence import kl_divergences
from peft_fusion.observe.own_inputs import OWN_LENGTH

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import compare_methods  # noqa: E402
from common.fine_tuning import be_quiet  # noqa: E402
from common.load_models import load_causal_lm  # noqa: E402
from common.reporting import text_table  # noqa: E402
from common.running_text import blocks, load_texts, perplexity  # noqa: E402
from common.text_tasks import draw  # noqa: E402
from quality_report import plot, show  # noqa: E402
from quality_texts import other_text, own_text  # noqa: E402
from quality_variants import LAYERS, VARIANTS  # noqa: E402

LENGTH = 256  # tokens of a sequence of data; the model's own have OWN_LENGTH
TUNING_TOKENS, TUNING_STEPS = 2**16, 600
STEP_TOKENS = 1024  # of a step of `distill`: its own batch, of the model's own text
TUNED = ("fusion", "pruning by saliency, refit")

Row = dict[str, Any]


def main() -> None:
    if sys.argv[1:2] == ["minilm"]:
        return compare_methods.main(sys.argv[2:])
    options = parse_arguments()
    be_quiet()
    rows = SmolLM2(options).rows()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print("\n" + text_table(columns, [[show(row.get(column)) for column in columns] for row in rows]))
    if options.plot:
        plot(rows, options.plot)
    return None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("task", choices=("smollm2", "minilm"), help="minilm takes the options of examples/compare_methods.py")
    add("--ratios", type=float, nargs="+", default=[0.5, 0.25], help="fractions of neurons kept (default: .5 .25)")
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    add("--text", choices=("other", "papers", "own"), default="other", help="what is calibrated on")
    add("--layers", choices=tuple(LAYERS), default="last", help="which layers are narrowed (default: last)")
    add("--quick", action="store_true", help="leave out output and NTK errors, which take minutes a row")
    add("--sequences", type=int, help="to calibrate on (default: 128 of 256 tokens, or 512 of 64 of its own)")
    add("--seed", type=int, default=0, help="of the calibration's and the distillation's text")
    add("--distill", type=int, default=0, metavar="TOKENS", help="also `distill`, on so many tokens of that text")
    add("--epochs", type=int, default=1, help="of the distillation")
    add("--learning-rate", type=float, help="of the distillation")
    add("--own-length", type=int, default=OWN_LENGTH, help="tokens of own sequences to distil on")
    add("--step-tokens", type=int, default=STEP_TOKENS, help="of a step of the distillation (default: %(default)s)")
    add("--tune", action="store_true", help=f"also `tune_layers`, for {' and '.join(TUNED)}")
    add("--json", type=Path, metavar="FILE", help="keep finished rows here")
    add("--plot", type=Path, metavar="FILE", help="perplexity against width")
    add("--smoke", action="store_true", help="little text, few steps: does everything work?")
    options = parser.parse_args()
    if options.sequences is not None and options.sequences < 4:
        parser.error(f"--sequences {options.sequences}: every fourth is held out, so at least 4 are needed.")
    length = sequence_length(options)
    if options.step_tokens < 1 or options.step_tokens % length:
        parser.error(f"--step-tokens {options.step_tokens}: a step takes whole sequences, which have {length} tokens.")
    return options


def sequence_length(options: argparse.Namespace) -> int:
    """Tokens of each sequence to distil on."""
    return int(options.own_length) if options.text == "own" else LENGTH


class SmolLM2:
    """The rows of the table on SmolLM2, all calibrated on the same text.

    Args:
        options: as `parse_arguments` returns them.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, small = options, options.smoke
        self.model, self.tokenizer = load_causal_lm(None)
        tokenizer = self.tokenizer
        papers = load_texts()
        self.held_out = blocks(tokenizer, papers[1], 512)[: 4 if small else 24]
        self.compared = draw(blocks(tokenizer, papers[1], 64), 4 if small else 24)
        usual = (8 if small else 128) * (LENGTH // OWN_LENGTH if options.text == "own" else 1)
        self.sequences = usual if options.sequences is None else options.sequences  # to calibrate on, and to tune on
        self.batches: list[dict[str, torch.Tensor]]
        if options.text == "own":
            sequences = (1 + options.tune) * self.sequences
            self.batches = own_text(self.model, tokenizer, sequences, options.json, options.seed)
        else:
            texts = other_text() if options.text == "other" else papers[0]
            pieces = blocks(tokenizer, texts, LENGTH)
            random.Random(options.seed).shuffle(pieces) if options.seed else None
            if len(pieces) < self.sequences:
                raise SystemExit(f"--sequences {self.sequences}: the text has {len(pieces)} of {LENGTH} tokens.")
            pieces = pieces[: 2 * self.sequences]
            self.batches = list(DataLoader(pieces, 8, collate_fn=default_data_collator))  # type: ignore[arg-type]

    def rows(self) -> list[Row]:
        """Every row, from the file of finished ones or computed and added to it."""
        options = self.options
        done: dict[str, Row] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
        found = []
        for ratio in options.ratios[:1] if options.smoke else options.ratios:
            for name in options.variants:
                key = self.name_of(name, ratio)
                if options.distill:
                    length = "" if options.own_length == OWN_LENGTH else f" by {options.own_length}"
                    steps = "" if options.step_tokens == STEP_TOKENS else f" in steps of {options.step_tokens}"
                    key += f" {options.distill} x {options.epochs} at {options.learning_rate}{length}{steps}"
                if key not in done:
                    done[key] = {"variant": name, "layers": options.layers, "ratio": ratio, "seed": options.seed}
                    done[key] |= self.row(name, ratio)
                    if options.json:
                        options.json.write_text(json.dumps(done, indent=1) + "\n")
                print(key, {column: show(value) for column, value in done[key].items()}, flush=True)
                found.append(done[key])
        return found

    def name_of(self, variant: str, ratio: float) -> str:
        """What tells a calibrated variant from all others."""
        options = self.options
        of = f" of {options.sequences}" if options.sequences else ""
        return f"{options.text} {variant} {options.layers} {ratio} {options.seed}{of}"

    def row(self, name: str, ratio: float) -> Row:
        """One variant at one width."""
        settings, calibrated = VARIANTS[name]
        if settings is None:
            return {"perplexity": perplexity(self.model, self.held_out)}
        layers = LAYERS[self.options.layers]
        config = FusionConfig(ratio=ratio, layers_to_transform=layers, seed=self.options.seed, **settings)
        whole = sum(parameter.numel() for parameter in self.model.model.layers.parameters())
        fused, row = self.fused(config, calibrated, self.name_of(name, ratio))
        removed = sum(full - narrow for full, narrow in fused.peft_config["default"].fused_widths.values())
        row["removed"] = removed * 3 * self.model.config.hidden_size / whole
        row |= self.judged(fused)
        if not self.options.quick:
            report = fidelity(fused, DataLoader(self.compared, 8, collate_fn=default_data_collator))  # type: ignore[arg-type]
            row["FFN output error"] = statistics.mean(ffn.output.relative for ffn in report.ffns)
            row["Adam-NTK error"] = report.ntk.adam.relative
        row["widths"] = [narrow for _, narrow in fused.peft_config["default"].fused_widths.values()]
        if self.options.tune and name in TUNED:
            row |= self.tune(fused)
        if self.options.distill:
            row |= self.distil(fused)
        fused.unload()
        return row

    def fused(self, config: FusionConfig, calibrated: bool, name: str) -> tuple[PeftModel, Row]:
        """The fused model and how long that took; from the adapter of an earlier run, if there is one."""
        options, started = self.options, time.perf_counter()
        folder = options.json and options.json.with_suffix("") / name.replace(" ", "_")
        if folder and folder.exists():
            return PeftModel.from_pretrained(self.model, folder, is_trainable=True), {}
        if calibrated:
            calibrate(self.model, config, self.batches, sequences=self.sequences)
        fused = get_peft_model(self.model, config)
        row: Row = {"seconds": time.perf_counter() - started}
        if folder:
            fused.save_pretrained(folder)
        return fused, row

    def judged(self, fused: torch.nn.Module, original: PreTrainedModel | None = None) -> Row:
        """Perplexity, and KL from the original, on the held-out papers.

        Args:
            fused: the narrow model.
            original: None: the same model with its adapter disabled.
        """
        found = {"perplexity": perplexity(fused, self.held_out)}
        divergences, losses = [], []
        with torch.no_grad():
            for block in self.held_out:
                inputs = default_data_collator([block])
                with nullcontext() if original is not None else fused.disable_adapter():  # type: ignore[operator]
                    right = (original or fused)(**inputs)
                losses.append(float(right.loss))
                ours = fused(input_ids=inputs["input_ids"]).logits[0]
                divergences.append(float(kl_divergences(ours, right.logits[0]).mean()))
        ratio = found["perplexity"] / math.exp(statistics.mean(losses))
        return found | {"to the original": ratio, "KL": statistics.mean(divergences)}

    def distil(self, fused: PeftModel) -> Row:
        """What `distill` makes of it."""
        options, started = self.options, time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=options.step_tokens // sequence_length(options),
                learning_rate=options.learning_rate or LEARNING_RATE,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                num_train_epochs=options.epochs,
                bf16=has_fast_bfloat16(self.model.device),
                eval_strategy="steps",
                eval_steps=0.25,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                use_cpu=not torch.cuda.is_available(),
                seed=options.seed,
            )
            found = distill(fused, self.to_distill(), tokens=options.distill, args=args)
        row = {f"{name}, distilled": value for name, value in self.judged(fused).items()}
        tokens = {"KL on its text": f"{found.before:.4f} -> {found.after:.4f}", "sequences": found.sequences}
        return row | tokens | {"seconds to distill": time.perf_counter() - started}

    def to_distill(self) -> list[dict[str, torch.Tensor]]:
        """Text to distil on: all of the training papers, or what the model samples beyond what it was calibrated on."""
        options, small = self.options, self.options.smoke
        if options.text != "own":
            texts = other_text() if options.text == "other" else load_texts()[0]
            pieces = blocks(self.tokenizer, texts, LENGTH)[: 8 if small else None]
            return [{"input_ids": torch.tensor([piece["input_ids"]])} for piece in pieces]
        sequences, seed = -(-options.distill // options.own_length), 1000 + options.seed
        return own_text(self.model, self.tokenizer, sequences, options.json, seed, options.own_length)

    def tune(self, fused: PeftModel) -> Row:
        """What `tune_layers(objective="ffn")` makes of it."""
        started = time.perf_counter()
        errors = tune_layers(fused, self.batches, tokens=TUNING_TOKENS, steps=5 if self.options.smoke else TUNING_STEPS)
        seconds = time.perf_counter() - started
        ratio = statistics.mean(after / before for before, after in errors.values())
        tuned = perplexity(fused, self.held_out)
        return {"perplexity, tuned": tuned, "FFN error, tuned / before": ratio, "seconds to tune": seconds}


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
