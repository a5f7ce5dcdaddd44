"""The card that PEFT writes for an adapter says what the adapter is, and keeps what someone wrote there."""

from __future__ import annotations

from architectures import BY_NAME
from helpers import half
from huggingface_hub import ModelCard
from peft import get_peft_model

from peft_fusion.tuner.card import END, START

LLAMA = BY_NAME["llama"]


def saved(folder, base="", **kwargs):
    model = LLAMA.make()
    model.name_or_path = model.config._name_or_path = base
    fused = get_peft_model(model, half(LLAMA, **kwargs))
    fused.save_pretrained(folder)
    return ModelCard.load(folder / "README.md")


def test_peft_s_template_is_filled_in(tmp_path):
    card = saved(tmp_path, base="me/llama", layers_to_transform=[1])
    assert (card.data["library_name"], card.data["base_model"]) == ("peft", "me/llama")
    assert {"peft-fusion", "transformers", "base_model:adapter:me/llama"} <= set(card.data["tags"])
    for told in (
        "An adapter of `me/llama` that puts narrower",
        "import peft_fusion",
        'base = AutoModelForCausalLM.from_pretrained("me/llama")',
        "**Finetuned from model [optional]:** me/llama",
        "| `model.layers.1.mlp` | 64 | 32 |",
        "- method: fusion\n",
        "- calibrated on: nothing",
        "- PEFT 0.",
    ):
        assert told in card.text
    assert "model.layers.2.mlp" not in card.text


def test_saved_again_it_tells_of_the_new_adapter(tmp_path):
    saved(tmp_path, layers_to_transform=[1])
    file = tmp_path / "README.md"
    file.write_text(file.read_text().replace("# Model Card for Model ID", "# My adapter"))
    card = saved(tmp_path, layers_to_transform=[2], method="svd")
    assert "# My adapter" in card.text and card.text.count(START) == card.text.count(END) == 1
    assert "`model.layers.2.mlp`" in card.text and "`model.layers.1.mlp`" not in card.text
    assert "- method: svd" in card.text


def test_where_the_base_lies_is_not_told(tmp_path):
    (tmp_path / "base").mkdir()
    card = saved(tmp_path / "adapter", base=str(tmp_path / "base"))
    assert "An adapter of `base`" in card.text and str(tmp_path) not in card.text


def test_a_text_of_one_s_own_is_left_alone_and_none_is_made(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMy words.\n")
    card = saved(tmp_path)
    assert card.data["license"] == "mit" and "My words." in card.text and START not in card.text
    half(LLAMA).save_pretrained(str(tmp_path / "alone"))
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["adapter_config.json"]
