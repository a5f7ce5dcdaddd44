"""Data to text: a causal language model learns to say what a few triples hold, with narrow FFNs.

    python examples/data_to_text.py             # SmolLM2-135M, WordNet's nouns -> glosses; minutes on two CPU cores
    python examples/data_to_text.py --smoke     # the same path in less than a minute; its figures mean nothing
    python examples/data_to_text.py --preset paper --model openai-community/gpt2 --dataset GEM/web_nlg:en
    python examples/data_to_text.py --dataset facts.jsonl --method fusion lora    # {"data": ..., "text": ...} a line

BLEU (sacrebleu, of all references) and perplexity of the texts, for the model as it came, fused, and fine-tuned.
`--preset paper` is the paper's: FFNs of the last two thirds of the layers to a quarter of their width by weights
alone, AdamW with weight decay .1, batches of 8. It searched the learning rate between 2e-5 and 6e-5; the number of
epochs is not stated, 5 is this example's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common.apply_method import FUSED, METHODS, prepare
from common.command_line import example_parser, output_folder, positive, run, write_json
from common.data_to_text_records import Record, load_records
from common.fine_tuning import be_quiet, fine_tune
from common.load_models import load_causal_lm
from common.paper_preset import add_options, check_methods, parse, training_steps
from common.prompted_texts import bleu, bleu_library, generate, padded, text_perplexity, tokenise
from common.reporting import text_table
from common.text_tasks import draw
from transformers import PreTrainedTokenizerBase

STEPS, TEST_RECORDS, MAX_NEW_TOKENS = 120, 64, 40
CALIBRATION_SEQUENCES = 256
SMOKE = {"steps": 3, "layers": "0", "max_test": 2, "max_new_tokens": 4, "beams": 1, "batch_size": 2}
LEARNING_RATES = {"full": 5e-5, "lora": 5e-4, "fused": 2e-4}
PRESET = {
    "batch_size": 8,
    "epochs": 5,
    "learning_rate": 5e-5,
    "settings": {"weight_decay": 0.1},
    "max_test": None,
    "beams": 5,
    "max_new_tokens": 100,
}


def main() -> None:
    options = parse_arguments()
    be_quiet()
    bleu_library()  # before anything slow
    train, test = load_records(options.dataset)
    test = draw(test, options.max_test)
    output = output_folder(options)
    rows: list[dict[str, Any]] = []
    for method in options.method:
        rows += stages(method, train, test, options, output / method, first=not rows)
    columns = ["model", f"BLEU ({len(test)} records)", "perplexity", "trained"]
    print(f"\n{text_table(columns, [cells(row) for row in rows])}\n")
    show_samples(rows[-1], test)
    print(f"what was trained is in {output}")
    write_json(options, {"dataset": options.dataset, "test_records": len(test), "rows": rows})


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `arguments` in its stead, for tests."""
    model = "Hub id, local path or .gguf file of a causal LM (default: SmolLM2-135M from a pip package)"
    parser = example_parser(__doc__, model=model, ratio=0.5, steps=STEPS)
    add = parser.add_argument
    add(
        "--dataset",
        default="wordnet",
        help="wordnet (default: facts on a noun -> its gloss; Debian's wordnet-base, or the path of a data.noun), "
        "JSON-lines, a folder of train.jsonl and test.jsonl, or a Hub id or local path (WebNLG's layouts are known)",
    )
    add("--method", nargs="+", choices=METHODS, default=["fusion"], help="one or more (default: fusion)")
    add("--beams", type=positive, default=1, help="1 is greedy (default: %(default)s)")
    add("--max-new-tokens", type=positive, default=MAX_NEW_TOKENS, help="of a text (default: %(default)s)")
    add("--max-tokens", type=positive, default=256, help="longer examples are left out (default: %(default)s)")
    add("--max-test", type=positive, default=TEST_RECORDS, help="test records (default: %(default)s)")
    rates = ", ".join(f"{rate} ({name})" for name, rate in LEARNING_RATES.items())
    add_options(parser, layers="last-half", batch_size=8, learning_rate=rates)
    options = parse(parser, PRESET, arguments)
    check_methods(options.method, options)
    if options.smoke:
        vars(options).update(SMOKE)
    return options


def stages(
    method: str, train: list[Record], test: list[Record], options: argparse.Namespace, folder: Path, first: bool
) -> list[dict[str, Any]]:
    """A model before and after each change; saves what was trained in `folder`.

    Args:
        method: one of `METHODS`.
        train: records to train on.
        test: records to test with.
        options: as `parse_arguments` returns them.
        folder: gets the adapter, or the model that was trained in full.
        first: whether the model as it came is to be tested as well.
    """
    model, tokenizer = load_causal_lm(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    examples = draw(training_pairs(train), options.max_train)
    steps = training_steps(options, len(examples))
    texts = tokenise(tokenizer, examples[: steps * options.batch_size], options.max_tokens)
    rate = options.learning_rate or LEARNING_RATES["fused" if method in FUSED else method]
    collator = padded(tokenizer)
    rows = [evaluate("as it came", model, tokenizer, test, options)] if first else []
    trained = prepare(
        model, method, "CAUSAL_LM", texts, collator, options, learning_rate=rate, sequences=CALIBRATION_SEQUENCES
    )
    if method in FUSED:
        rows.append(evaluate(f"{method}, not trained", trained, tokenizer, test, options))
    _, seconds = fine_tune(
        trained,
        texts,
        collator,
        title=method,
        steps=steps,
        batch_size=options.batch_size,
        learning_rate=rate,
        settings=options.settings,
    )
    rows.append(evaluate(f"{method}, fine-tuned", trained, tokenizer, test, options))
    trainable = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    rows[-1] |= {"trainable": trainable, "seconds_per_step": seconds, "steps": steps, "learning_rate": rate}
    trained.save_pretrained(folder, **({} if method == "full" else {"save_embedding_layers": False}))  # type: ignore
    return rows


def training_pairs(records: list[Record]) -> list[tuple[str, str]]:
    """(data, text) for every reference of every record, in random order."""
    return draw([(record.data, text) for record in records for text in record.references], None)


def evaluate(
    name: str, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, test: list[Record], options: Any
) -> dict[str, Any]:
    """BLEU of generated texts and perplexity of the references, of one stage."""
    print(f"{name}: testing", flush=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    outputs = generate(
        model,
        tokenizer,
        [record.data for record in test],
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        beams=options.beams,
    )
    pairs = [(record.data, text) for record in test for text in record.references]
    perplexity = text_perplexity(model, tokenizer, tokenise(tokenizer, pairs, options.max_tokens), options.batch_size)
    return {
        "model": name,
        "bleu": bleu(outputs, [record.references for record in test]),
        "perplexity": perplexity,
        "outputs": outputs,
    }


def cells(row: dict[str, Any]) -> list[str]:
    trained = f"{row['trainable'] / 1e6:.2f} M" if "trainable" in row else ""
    return [row["model"], f"{row['bleu']:.1f}", f"{row['perplexity']:.1f}", trained]


def show_samples(row: dict[str, Any], test: list[Record], count: int = 3) -> None:
    for record, text in list(zip(test, row["outputs"], strict=True))[:count]:
        print(f"data: {record.data}\n  {row['model']}: {text}\n  reference: {record.references[0]}")


if __name__ == "__main__":
    run(main)
