"""What both scripts need: a causal language model with its tokenizer, and a text file cut into blocks."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

Block = dict[str, torch.Tensor]


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options that both have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or local path of a causal language model")
    parser.add_argument("--data", type=Path, required=True, help="a text file, of the kind that the model is for")
    parser.add_argument("--block", type=int, default=256, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=128, help="sequences of the text (default: %(default)s)")
    parser.add_argument("--adapter", type=Path, required=True, help="the adapter's folder")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step, on all ranks (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="default: %(default)s")
    return parser


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, list[Block]]:
    """The model in the dtype that it was saved in, and the first blocks of the text."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.data.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    whole = ids[: len(ids) // options.block * options.block].view(-1, options.block)[: options.sequences]
    if len(whole) < options.sequences:
        raise SystemExit(f"error: {options.data} has {len(whole)} blocks of {options.block} tokens: take fewer")
    blocks = [{"input_ids": block, "labels": block} for block in whole]
    return AutoModelForCausalLM.from_pretrained(options.model, dtype="auto"), blocks
