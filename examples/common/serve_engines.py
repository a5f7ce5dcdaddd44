"""Greedy generation by transformers, vLLM and llama.cpp. serve.py calls it in fresh processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from .reporting import peak_memory

ENGINES = {"transformers": "transformers", "vllm": "vllm", "llama.cpp": "xllamacpp"}
"""Engine -> the module that it comes in."""

CONTEXT = 256
REPEATS = 3


def missing(engine: str) -> str | None:
    """The module that an engine lacks, if it is not installed."""
    return None if find_spec(ENGINES[engine]) else ENGINES[engine]


def generate(engine: str, model: str, tokenizer: str, prompt: str, tokens: int) -> dict[str, Any]:
    """Continues a prompt, once to warm up and then three times, of which the fastest counts.

    Args:
        engine: a key of `ENGINES`.
        model: Hub id or path; for llama.cpp a gguf file.
        tokenizer: Hub id or path of the tokenizer, the same for all engines.
        prompt: the text.
        tokens: how many to make.

    Returns:
        "tokens": their ids; "per_second": how many were made a second; "peak_memory": the process's, in MB, with the
        libraries; "version": the engine's.
    """
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tokenizer)(prompt)["input_ids"]
    make = {"transformers": _transformers, "vllm": _vllm, "llama.cpp": _llama_cpp}[engine](model)
    make(ids, 2)
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        made = make(ids, tokens)
        seconds.append(time.perf_counter() - started)
    return {
        "tokens": made,
        "per_second": len(made) / min(seconds),
        "peak_memory": peak_memory(),
        "version": _version(ENGINES[engine]),
    }


def _transformers(path: str) -> Callable[[list[int], int], list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32).eval()

    def make(ids: list[int], tokens: int) -> list[int]:
        options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
        prompt = torch.tensor([ids])
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, len(ids) :].tolist()

    return make


def _vllm(path: str) -> Callable[[list[int], int], list[int]]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, whose memory is taken
    from vllm import LLM, SamplingParams

    engine = LLM(path, trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=CONTEXT)

    def make(ids: list[int], tokens: int) -> list[int]:
        parameters = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens)
        return list(engine.generate({"prompt_token_ids": ids}, parameters)[0].outputs[0].token_ids)

    return make


def _llama_cpp(path: str) -> Callable[[list[int], int], list[int]]:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = path, CONTEXT, 1
    parameters.cpuparams.n_threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count()
    parameters.verbosity = 0
    engine = xllamacpp.Server(parameters)

    def make(ids: list[int], tokens: int) -> list[int]:
        options = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "cache_prompt": False}
        # its completions in OpenAI's form are text; in the verbose part there are the tokens
        made = engine.handle_completions({"prompt": ids, **options, "verbose": True, "return_tokens": True})
        return list(made["__verbose"]["tokens"])

    return make


def _version(package: str) -> str:
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except ModuleNotFoundError:  # `PackageNotFoundError` is one
            continue
    return "unknown"
