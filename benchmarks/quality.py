"""How good narrow FFNs are, on real weights and held-out text: fusion, its variants, and honest baselines.

    python benchmarks/quality.py smollm2 --tune --json smollm2.json --plot smollm2.png   about an hour on two cores
    python benchmarks/quality.py smollm2 --text own --variants original fusion           calibrated without data
    python benchmarks/quality.py minilm --results minilm      examples/compare_methods.py: accuracy after fine-tuning
    python benchmarks/quality.py smollm2 --smoke              (or minilm) small; its figures mean nothing

SmolLM2-135M: the last 16 of 30 layers are narrowed and nothing is trained. Perplexity on held-out scientific papers;
output error and Adam-NTK error on other blocks of them. The calibration text is of another domain (`--text other`:
WordNet's glosses), the papers of the training split (`--text papers`) or what the model samples itself (`--text own`);
`--tune` takes more of the text. Every pruning row has the text, refit and scale of the fusion row beside it; in
"fisher kernel" its saliency is also measured in the metric that fusion uses. A finished row is read from `--json` and
not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, default_data_collator

from peft_fusion import FusionConfig, calibrate, fidelity, tune_layers
from peft_fusion.observe.own_inputs import OWN_LENGTH, own_inputs

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import compare_methods  # noqa: E402
from common import wordnet  # noqa: E402
from common.fine_tuning import be_quiet  # noqa: E402
from common.load_models import load_causal_lm  # noqa: E402
from common.reporting import text_table  # noqa: E402
from common.running_text import blocks, load_texts, perplexity  # noqa: E402
from common.text_tasks import draw  # noqa: E402

LAYERS = list(range(14, 30))
LENGTH = 256  # tokens of a sequence of data; the model's own have OWN_LENGTH
TUNING_TOKENS, TUNING_STEPS = 2**16, 600
TUNED = ("fusion", "pruning by saliency, refit")
OFF_CHART = 5  # a plot shows perplexities of up to so many times the original's

# row -> (settings of the configuration, or None for no fusion; whether it is calibrated)
VARIANTS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "original": (None, False),
    "fusion as published": ({}, False),
    "clustering": ({"method": "clustering"}, False),
    "pruning by norms": ({"method": "pruning"}, False),
    "random narrow FFNs": ({"init_weights": False}, False),
    "pruning by saliency, no refit, no scale": ({"method": "pruning", "refit": "none", "scale": "none"}, True),
    "pruning by saliency, refit, no scale": ({"method": "pruning", "scale": "none"}, True),
    "pruning by saliency, refit": ({"method": "pruning"}, True),
    "fusion, centroids, refit": ({"representative": "centroid"}, True),
    "fusion, weight kernel, refit": ({"kernel": "weights"}, True),
    "pruning by saliency, fisher kernel, refit": ({"method": "pruning", "kernel": "fisher"}, True),
    "fusion, outputs kernel": ({"kernel": "outputs"}, True),
    "fusion, ntk kernel": ({"kernel": "ntk"}, True),
    "fusion": ({}, True),
}
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
    add("--tune", action="store_true", help=f"also `tune_layers`, for {' and '.join(TUNED)}")
    add("--json", type=Path, metavar="FILE", help="keep finished rows here")
    add("--plot", type=Path, metavar="FILE", help="perplexity against width")
    add("--smoke", action="store_true", help="little text, few steps: does everything work?")
    return parser.parse_args()


class SmolLM2:
    """The rows of the table on SmolLM2, all calibrated on the same text.

    Args:
        options: as `parse_arguments` returns them.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, small = options, options.smoke
        self.model, tokenizer = load_causal_lm(None)
        papers = load_texts()
        self.held_out = blocks(tokenizer, papers[1], 512)[: 4 if small else 24]
        self.compared = draw(blocks(tokenizer, papers[1], 64), 4 if small else 24)
        self.sequences = 8 if small else 128  # to calibrate on; as many again to tune on
        self.batches: list[dict[str, torch.Tensor]]
        if options.text == "own":
            self.sequences *= LENGTH // OWN_LENGTH
            self.batches = own_text(self.model, 2 * self.sequences, options.json)
        else:
            texts = other_text() if options.text == "other" else papers[0]
            pieces = blocks(tokenizer, texts, LENGTH)[: 2 * self.sequences]
            self.batches = list(DataLoader(pieces, 8, collate_fn=default_data_collator))  # type: ignore[arg-type]

    def rows(self) -> list[Row]:
        """Every row, from the file of finished ones or computed and added to it."""
        options = self.options
        done: dict[str, Row] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
        found = []
        for ratio in options.ratios[:1] if options.smoke else options.ratios:
            for name in options.variants:
                key = f"{options.text} {name} {ratio}"
                if key not in done:
                    done[key] = {"variant": name, "ratio": ratio} | self.row(name, ratio)
                    if options.json:
                        options.json.write_text(json.dumps(done, indent=1) + "\n")
                print(key, {column: show(value) for column, value in done[key].items()}, flush=True)
                found.append(done[key])
        return found

    def row(self, name: str, ratio: float) -> Row:
        """One variant at one width."""
        settings, calibrated = VARIANTS[name]
        if settings is None:
            return {"perplexity": perplexity(self.model, self.held_out)}
        config = FusionConfig(ratio=ratio, layers_to_transform=LAYERS, **settings)
        started = time.perf_counter()
        if calibrated:
            calibrate(self.model, config, self.batches, sequences=self.sequences)
        fused = get_peft_model(self.model, config)
        row = {"seconds": time.perf_counter() - started}
        row["perplexity"] = perplexity(fused, self.held_out)
        report = fidelity(fused, DataLoader(self.compared, 8, collate_fn=default_data_collator))  # type: ignore[arg-type]
        row["FFN output error"] = statistics.mean(ffn.output.relative for ffn in report.ffns)
        row["Adam-NTK error"] = report.ntk.adam.relative
        if self.options.tune and name in TUNED:
            row |= self.tune(fused)
        fused.unload()
        return row

    def tune(self, fused: PeftModel) -> Row:
        """What `tune_layers(objective="ffn")` makes of it."""
        started = time.perf_counter()
        errors = tune_layers(fused, self.batches, tokens=TUNING_TOKENS, steps=5 if self.options.smoke else TUNING_STEPS)
        seconds = time.perf_counter() - started
        ratio = statistics.mean(after / before for before, after in errors.values())
        tuned = perplexity(fused, self.held_out)
        return {"perplexity, tuned": tuned, "FFN error, tuned / before": ratio, "seconds to tune": seconds}


def own_text(model: PreTrainedModel, sequences: int, results: Path | None) -> list[dict[str, torch.Tensor]]:
    """What the model samples itself; kept beside the finished rows, as it takes minutes."""
    kept = results.with_suffix(f".own{sequences}x{OWN_LENGTH}.safetensors") if results else None
    if kept and kept.exists():
        ids = load_file(kept)["input_ids"]
    else:
        ids = torch.cat([batch["input_ids"] for batch in own_inputs(model, sequences, OWN_LENGTH, seed=0)])
        if kept:
            save_file({"input_ids": ids}, kept)
    return [{"input_ids": part} for part in ids.split(32)]


def other_text() -> list[str]:
    """Text that is not from papers: WordNet's glosses, forty a document."""
    if wordnet.NOUNS.is_file():
        pairs = wordnet.glosses(wordnet.read_nouns())
        return ["\n".join(gloss for gloss, _ in pairs[start : start + 40]) for start in range(0, 16000, 40)]
    raise SystemExit("Calibration text of another domain: apt install wordnet-base, or use --text own.")


def plot(rows: list[Row], path: Path) -> None:
    """Perplexity against width, a line a variant; the legend names those that are off the chart."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=colormaps["tab20"].colors)  # type: ignore[attr-defined]
    original = next((row["perplexity"] for row in rows if row["variant"] == "original"), None)
    if original:
        axes.axhline(original, color="black", linestyle=":", label="original")
    for name in dict.fromkeys(row["variant"] for row in rows if row["variant"] != "original"):
        for column, style in (("perplexity", "o-"), ("perplexity, tuned", "s--")):
            points = sorted((row["ratio"], row[column]) for row in rows if row["variant"] == name and column in row)
            label = name if column == "perplexity" else f"{name}, tuned"
            if points and original and points[-1][1] > OFF_CHART * original:
                axes.plot([], [], " ", label=f"{label}: above {min(p for _, p in points):,.0f}")
            elif points:
                axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="fraction of the neurons kept", ylabel="perplexity")
    figure.legend(fontsize=7, loc="outside right")
    figure.savefig(path, dpi=120)


def show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
