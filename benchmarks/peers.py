"""Fusion beside other libraries that make FFNs narrower: the same model, widths and text, in one run.

    pip install torch-pruning optipfair
    python benchmarks/peers.py --json peers.json                         16 of 30 FFNs at half width, its own text
    python benchmarks/peers.py --text papers --layers all --ratios .729  as many neurons in all 30
    python benchmarks/peers.py --smoke                                   small; its figures mean nothing

SmolLM2-135M, nothing is trained. Torch-Pruning prunes the hidden neurons by their group's magnitude, or by the Taylor
expansion of the loss on the text (its recommendation where there is data), each FFN alike or with one ranking for all
(`global`). OptiPFair prunes GLU FFNs by the maximal absolute weight, with data by a hybrid of weights and activations.
None of them refits what is left; "fusion, no refit" and "pruning, refit" say what of the difference is the refit's.
Figures: perplexity and KL from the original on held-out papers, and the share of all parameters that is removed.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from peft_fusion import FusionConfig, calibrate

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import quality  # noqa: E402
from common.fine_tuning import be_quiet  # noqa: E402
from common.reporting import text_table  # noqa: E402
from quality_report import show  # noqa: E402
from quality_variants import LAYERS  # noqa: E402

Row = dict[str, Any]
Batches = list[dict[str, Tensor]]
BATCH = 8


def main() -> None:
    options = parse_arguments()
    be_quiet()
    found = Comparison(options).rows()
    columns = list(dict.fromkeys(name for row in found for name in row))
    print("\n" + text_table(columns, [[show(row.get(column)) for column in columns] for row in found]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ratios", type=float, nargs="+", default=[0.5], help="fractions of neurons kept (default: .5)")
    add("--layers", choices=tuple(LAYERS), default="last", help="which layers are narrowed (default: last)")
    add("--text", choices=("other", "papers", "own"), default="own", help="what is calibrated on (default: own)")
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="keep finished rows here")
    add("--smoke", action="store_true", help="little text: does everything work?")
    parser.set_defaults(tune=False, distill=0, quick=True, sequences=None)
    return parser.parse_args()


class Comparison(quality.SmolLM2):
    """The rows, all of one model and one text."""

    def rows(self) -> list[Row]:
        options = self.options
        done: dict[str, Row] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
        found = []
        for ratio in options.ratios:
            for name in options.rows:
                key = f"{name} {options.text} {options.layers} {ratio} {options.seed}"
                if key not in done:
                    done[key] = {"row": name, "text": options.text, "layers": options.layers, "kept": ratio}
                    done[key] |= self.measured(ROWS[name], ratio)
                    if options.json:
                        options.json.write_text(json.dumps(done, indent=1) + "\n")
                print(key, {column: show(value) for column, value in done[key].items()}, flush=True)
                found.append(done[key])
        return found

    def measured(self, narrow: Callable[..., nn.Module], ratio: float) -> Row:
        """What one way to narrow the model comes to."""
        layers = LAYERS[self.options.layers] or list(range(len(self.model.model.layers)))
        batches = [{"input_ids": ids} for batch in self.batches for ids in batch["input_ids"].split(BATCH)]
        batches = batches[: self.sequences // BATCH]
        started = time.perf_counter()
        narrowed = narrow(copy.deepcopy(self.model), layers, ratio, batches, self.options.seed)
        row: Row = {"seconds": time.perf_counter() - started}
        plain = narrowed.merge_and_unload() if isinstance(narrowed, PeftModel) else narrowed
        row["removed"] = 1 - plain.num_parameters() / self.model.num_parameters()
        return row | self.judged(plain, self.model)


def fused(**settings: Any) -> Callable[..., nn.Module]:
    """A row of this library."""

    def narrow(model: PreTrainedModel, layers: list[int], ratio: float, batches: Batches, seed: int) -> nn.Module:
        config = FusionConfig(ratio=ratio, layers_to_transform=layers, seed=seed, **settings)
        calibrate(model, config, batches, sequences=10**6)
        return get_peft_model(model, config)

    return narrow


def torch_pruned(data: bool, together: bool) -> Callable[..., nn.Module]:
    """Torch-Pruning's pruner over the FFNs, by magnitude or by the loss's gradients."""

    def narrow(model: PreTrainedModel, layers: list[int], ratio: float, batches: Batches, seed: int) -> nn.Module:
        import torch_pruning as tp

        for batch in batches if data else ():
            model(**batch, labels=batch["input_ids"]).loss.backward()
        ffns = SideBySide([model.model.layers[i].mlp for i in layers])
        pruner = tp.pruner.BasePruner(
            ffns,
            example_inputs=torch.zeros(1, 2, model.config.hidden_size),
            importance=tp.importance.GroupTaylorImportance() if data else tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=together,
            pruning_ratio=1 - ratio,
            ignored_layers=[ffn.down_proj for ffn in ffns.ffns],
            round_to=8,
        )
        pruner.step()
        model.zero_grad()
        return model

    return narrow


class SideBySide(nn.Module):
    """FFNs as one module, for a pruner that ranks the neurons of all of them."""

    def __init__(self, ffns: list[nn.Module]) -> None:
        super().__init__()
        self.ffns: Any = nn.ModuleList(ffns)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([ffn(x) for ffn in self.ffns])


def optipfair_pruned(data: bool) -> Callable[..., nn.Module]:
    """OptiPFair's GLU pruning, by weights or by weights and activations."""

    def narrow(model: PreTrainedModel, layers: list[int], ratio: float, batches: Batches, seed: int) -> nn.Module:
        import optipfair

        loader = DataLoader(batches, batch_size=None) if data else None  # type: ignore[arg-type]
        pruned: nn.Module = optipfair.prune_model(
            model,
            neuron_selection_method="MAW",
            pruning_percentage=100 * (1 - ratio),
            dataloader=loader,
            layer_indices=layers,
            show_progress=False,
        )
        return pruned

    return narrow


def unchanged(model: PreTrainedModel, *_: Any) -> nn.Module:
    return model


ROWS: dict[str, Callable[..., nn.Module]] = {
    "original": unchanged,
    "fusion, budget": fused(allocation="fisher"),
    "fusion": fused(),
    "fusion, no refit": fused(refit="none"),
    "pruning, refit (ours)": fused(method="pruning", kernel="fisher"),
    "Torch-Pruning, magnitude": torch_pruned(data=False, together=False),
    "Torch-Pruning, magnitude, global": torch_pruned(data=False, together=True),
    "Torch-Pruning, Taylor": torch_pruned(data=True, together=False),
    "Torch-Pruning, Taylor, global": torch_pruned(data=True, together=True),
    "OptiPFair, weights": optipfair_pruned(data=False),
    "OptiPFair, weights and activations": optipfair_pruned(data=True),
}

if __name__ == "__main__":
    torch.manual_seed(0)
    main()
