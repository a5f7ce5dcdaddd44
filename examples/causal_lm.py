"""A causal language model: fused, fine-tuned by the plain `Trainer`, its perplexity at each stage, a sample.

python examples/causal_lm.py             # SmolLM2-135M on scientific papers; minutes on two CPU cores
python examples/causal_lm.py --smoke     # the same path in less than a minute; its figures mean nothing
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

from common.command_line import example_parser, layer_indices, output_folder, positive, rate, run, write_json
from common.errors import InputError
from common.fine_tuning import be_quiet, fine_tune
from common.load_models import load_causal_lm
from common.reporting import folder_size, peak_memory, text_table
from common.running_text import Block, blocks, load_texts, perplexity
from common.text_tasks import draw
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, default_data_collator, set_seed

from peft_fusion import FusionConfig, calibrate

BATCH_SIZE = 2
LEARNING_RATE = 1e-4
CALIBRATION_BATCH, CALIBRATION_SEQUENCES = 8, 64
STEPS, SMOKE_STEPS = 120, 3
HELD_OUT_BLOCKS, SMOKE_BLOCKS = 48, 4
SAMPLE_TOKENS = 60


def main() -> None:
    options = parse_arguments()
    be_quiet()
    model, tokenizer = load_causal_lm(options.model)
    layers = layer_indices(options.layers, model.config.get_text_config().num_hidden_layers)
    train, held_out = load_blocks(tokenizer, options)
    print(f"training on {len(train)} blocks of {options.block} tokens, perplexity on {len(held_out)} others")
    parameters, perplexities = model.num_parameters(), {"as it came": perplexity(model, held_out)}

    config = FusionConfig(task_type="CAUSAL_LM", ratio=options.ratio, layers_to_transform=layers)
    if options.calibration != "none":
        batches = DataLoader(train, CALIBRATION_BATCH, collate_fn=default_data_collator)  # type: ignore[arg-type]
        sequences = 2 * SMOKE_BLOCKS if options.smoke else CALIBRATION_SEQUENCES
        calibrate(model, config, batches if options.calibration == "data" else None, sequences=sequences)
    fused = get_peft_model(model, config)
    perplexities["fused"] = perplexity(fused, held_out)
    _, seconds = fine_tune(
        fused,
        train,
        default_data_collator,
        title="fine-tuning",
        steps=options.steps,
        batch_size=BATCH_SIZE,
        learning_rate=options.learning_rate,
    )
    perplexities["fused and fine-tuned"] = perplexity(fused, held_out)

    folder = output_folder(options)
    fused.save_pretrained(folder, save_embedding_layers=False)
    plain = merge(fused)
    figures = {
        "perplexity": perplexities,
        "held_out_tokens": len(held_out) * options.block,
        "parameters": parameters,
        "merged_parameters": plain.num_parameters(),
        "seconds_per_step": seconds,
        "peak_memory_mb": peak_memory(),
        "adapter_mb": folder_size(folder),
    }
    report(figures)
    print(f"adapter: {folder}\n\nsample:\n{sample(plain, tokenizer, options.prompt)}")
    write_json(options, figures)


def parse_arguments() -> argparse.Namespace:
    model = "Hub id, local path or .gguf file (default: SmolLM2-135M from a pip package)"
    parser = example_parser(__doc__, model=model, ratio=0.5, steps=STEPS)
    add = parser.add_argument
    add(
        "--text",
        default="papers",
        help="papers (default, from a pip package), a text file, Hub id or local path",
    )
    add("--layers", default="last-half", help="all, last-half (default), last-two-thirds, or layers such as 3,5,8-11")
    add("--block", type=positive, default=256, help="tokens in a training example (default: %(default)s)")
    add("--learning-rate", type=rate, default=LEARNING_RATE, help="default: %(default)s")
    add(
        "--calibration",
        choices=("data", "own", "none"),
        default="data",
        help="what the FFNs are fused by: data (default: the training blocks), own (text that the model samples "
        "itself), none (the weights alone, as in the paper)",
    )
    add("--prompt", default="In this paper, we", help="start of the sample (default: %(default)s)")
    options = parser.parse_args()
    options.held_out_blocks = HELD_OUT_BLOCKS
    if options.smoke:
        options.steps, options.held_out_blocks = SMOKE_STEPS, SMOKE_BLOCKS
    return options


def load_blocks(tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> tuple[list[Block], list[Block]]:
    """Random blocks of the training and of the held-out documents, as many as are needed."""
    train, held_out = (blocks(tokenizer, texts, options.block) for texts in load_texts(options.text))
    if not (train and held_out):
        raise InputError(f"--text {options.text}: too short for blocks of {options.block} tokens")
    return draw(train, options.steps * BATCH_SIZE), draw(held_out, options.held_out_blocks)


def merge(fused: PeftModel) -> PreTrainedModel:
    with warnings.catch_warnings():
        # A model of layers of two widths is no stock checkpoint, but here it is only sampled from.
        warnings.filterwarnings("ignore", message="The merged model works")
        return fused.merge_and_unload()


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    set_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.eval().generate(**inputs, max_new_tokens=SAMPLE_TOKENS, do_sample=True, temperature=0.7, top_p=0.9)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def report(figures: dict[str, Any]) -> None:
    columns = ["model", f"perplexity ({figures['held_out_tokens']} held-out tokens)"]
    rows = [[name, f"{value:.1f}"] for name, value in figures["perplexity"].items()]
    print(f"\n{text_table(columns, rows)}\n")
    full, merged = figures["parameters"] / 1e6, figures["merged_parameters"] / 1e6
    print(f"parameters: {full:.1f} M, merged {merged:.1f} M; adapter {figures['adapter_mb']:.1f} MB")
    seconds, memory = figures["seconds_per_step"], figures["peak_memory_mb"]
    print(f"training: {seconds:.2f} s a step, peak memory {memory:.0f} MB")


if __name__ == "__main__":
    run(main)
