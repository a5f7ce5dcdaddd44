"""Greedy generation by transformers, vLLM and llama.cpp. serve.py calls it in fresh processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from .errors import InputError
from .reporting import peak_memory

ENGINES = {"transformers": "transformers", "vllm": "vllm", "llama.cpp": "xllamacpp"}
"""Engine -> the module that it comes in."""

CONTEXT = 256  # tokens of a sequence at most, prompt and continuation
REPEATS = 3
Make = Callable[[list[list[int]], int], list[list[int]]]
"""Continues prompts, all at once, by so many tokens each."""


def missing(engine: str) -> str | None:
    """The module that an engine lacks, if it is not installed."""
    return None if find_spec(ENGINES[engine]) else ENGINES[engine]


def generate(
    engine: str, model: str, tokenizer: str, prompt: str, tokens: int, sequences: int = 1, prompt_tokens: int = 0
) -> dict[str, Any]:
    """Continues a prompt, once to warm up and then three times, of which the fastest counts.

    Args:
        engine: a key of `ENGINES`.
        model: Hub id or path; for llama.cpp a gguf file.
        tokenizer: Hub id or path of the tokenizer, the same for all engines.
        prompt: the text.
        tokens: how many to make; at least 2.
        sequences: how many times at once, each by itself: no engine keeps what it computed of one for the others.
        prompt_tokens: how long the prompt is, repeated or cut; 0: as long as it is.

    Returns:
        "tokens": the ids of one sequence's; "prefill": how many tokens of the prompts were read a second, up to the
        first new one; "decode": how many were made a second from there on; "peak_memory": the process's, in MB, with
        the libraries; "version": the engine's.

    Raises:
        InputError: if prompt and continuation are longer than the context that the engines are given.
    """
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tokenizer)(prompt)["input_ids"]
    if prompt_tokens:
        ids = (ids * -(-prompt_tokens // len(ids)))[:prompt_tokens]
    if len(ids) + tokens > CONTEXT:
        raise InputError(f"a prompt of {len(ids)} tokens and {tokens} new ones: at most {CONTEXT} are served here.")
    prompts = [ids] * sequences
    make = {"transformers": _transformers, "vllm": _vllm, "llama.cpp": _llama_cpp}[engine](model, sequences)
    make(prompts, 2)
    first, whole = [], []
    for _ in range(REPEATS):
        first.append(_seconds(lambda: make(prompts, 1))[0])
        seconds, made = _seconds(lambda: make(prompts, tokens))
        whole.append(seconds)
    return {
        "tokens": made[0],
        "prefill": sequences * len(ids) / min(first),
        "decode": sequences * (tokens - 1) / (min(whole) - min(first)),
        "peak_memory": peak_memory(),
        "version": _version(ENGINES[engine]),
    }


def _seconds(make: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    made = make()
    return time.perf_counter() - started, made


def _transformers(path: str, sequences: int) -> Make:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32).eval()

    def make(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
        ids = torch.tensor(prompts)
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :].tolist()

    return make


def _vllm(path: str, sequences: int) -> Make:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, whose memory is taken
    from vllm import LLM, SamplingParams

    engine = LLM(
        path,
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=CONTEXT,
        max_num_seqs=sequences,
        enable_prefix_caching=False,  # it would read a prompt once, and not again when that is timed
    )

    def make(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        parameters = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens)
        made = engine.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
        return [list(request.outputs[0].token_ids) for request in made]

    return make


def _llama_cpp(path: str, sequences: int) -> Make:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = path, CONTEXT * sequences, sequences
    parameters.cpuparams.n_threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count()
    parameters.verbosity = 0
    engine = xllamacpp.Server(parameters)

    def make(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        options = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "cache_prompt": False}

        def continued(ids: list[int]) -> list[int]:
            # its completions in OpenAI's form are text; in the verbose part there are the tokens
            made = engine.handle_completions({"prompt": ids, **options, "verbose": True, "return_tokens": True})
            return list(made["__verbose"]["tokens"])

        with ThreadPoolExecutor(sequences) as pool:  # its server puts together what is asked at the same time
            return list(pool.map(continued, prompts))

    return make


def _version(package: str) -> str:
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except ModuleNotFoundError:  # `PackageNotFoundError` is one
            continue
    return "unknown"
