"""Every model type of transformers that has a tiny model: the whole life of an adapter, or a refusal by name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import transformers as tf
from model_types.build import classes
from model_types.known import OUTCOMES, read
from model_types.life import live
from model_types.table import table

KNOWN = read()
NEWEST = "5.23."  # of transformers, which the list is of; others may have more types, or fewer
TRIED = [name for name, life in KNOWN.items() if life.outcome != "untried" and name in classes()]
COMMON = [
    "albert",
    "bart",
    "bert",
    "clip",
    "deberta-v2",
    "deepseek_v3",
    "distilbert",
    "electra",
    "falcon",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "llama",
    "mamba",
    "mistral",
    "mixtral",
    "modernbert",
    "mpt",
    "olmo2",
    "olmoe",
    "opt",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "roberta",
    "smollm3",
    "t5",
    "vit",
    "wav2vec2",
    "whisper",
    "xlm-roberta",
]
EACH = [pytest.param(name, marks=() if name in COMMON else pytest.mark.slow) for name in TRIED]


@pytest.mark.parametrize("model_type", EACH)
def test_the_life_of_an_adapter(model_type, tmp_path):
    assert live(model_type, tmp_path) == KNOWN[model_type]


def test_what_is_known_of_types(capsys):
    assert set(COMMON) <= set(KNOWN)
    counts = Counter(life.outcome for life in KNOWN.values())
    with capsys.disabled():
        print(f"\n{len(KNOWN)} model types: {dict(counts)}")
    if tf.__version__.startswith(NEWEST):
        assert KNOWN.keys() == classes().keys()
    assert counts["works"] + counts["adapter"] > 150 and counts.keys() <= OUTCOMES.keys()
    assert all(life.reason for life in KNOWN.values() if life.outcome != "works" or life.kept)


def test_the_table_in_the_documentation_is_of_these():
    page = Path(__file__).parents[1] / "docs" / "model_types.md"
    assert page.read_text() == table(KNOWN), "run `python -m model_types.table` in tests/"
