"""Uploading: exports and adapters arrive on the Hub whole, and what cannot be uploaded is refused before any work."""

from __future__ import annotations

import huggingface_hub
import pytest
import torch
from architectures import BY_NAME
from helpers import half, logits
from huggingface_hub import constants
from peft import PeftModel, get_peft_model
from stand_in_hub import stand_in_hub
from transformers import AutoModelForCausalLM

from peft_fusion import export

LLAMA = BY_NAME["llama"]


@pytest.fixture
def hub(monkeypatch):
    with stand_in_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", found.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
        yield found


def written(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("layers", [None, [1, 2]], ids=["one width", "mixed"])
def test_an_export_arrives_whole(hub, layers, tmp_path):
    model = get_peft_model(LLAMA.make(), half(LLAMA, layers_to_transform=layers))
    done = export(model, tmp_path / "small", check=False, push_to_hub="me/small", private=True)
    assert done.repository == "me/small"
    asked = hub.repositories["me/small"]
    assert asked.get("private") is True or asked.get("visibility") == "private"
    assert hub.files["me/small"] == written(tmp_path / "small")
    assert ("modeling_narrow.py" in hub.files["me/small"]) == (layers is not None)
    assert b'from_pretrained("me/small"' in hub.files["me/small"]["README.md"]
    assert hub.messages == ["Upload a model exported by peft-fusion"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=layers is not None)
    torch.testing.assert_close(logits(loaded, LLAMA), logits(model, LLAMA))


def test_a_name_of_ones_own_and_a_message(hub, tmp_path):
    model = get_peft_model(LLAMA.make(), half(LLAMA))
    done = export(model, tmp_path / "small", check=False, push_to_hub="small", commit_message="half as wide")
    assert done.repository == "me/small" and hub.messages == ["half as wide"]


def test_what_cannot_be_uploaded_is_refused_before_any_work(hub, monkeypatch, tmp_path):
    model = get_peft_model(LLAMA.make(), half(LLAMA))
    with pytest.raises(ValueError, match="is no id of a repository, such as `me/small`"):
        export(model, tmp_path / "small", push_to_hub="a/b/c")
    hub.known = False
    with pytest.raises(OSError, match="Invalid user token|401"):
        export(model, tmp_path / "small", push_to_hub="me/small")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        export(model, tmp_path / "small", push_to_hub="me/small")
    assert not list(tmp_path.iterdir()) and not hub.repositories


@pytest.mark.slow
def test_an_adapter_arrives_whole(hub, tmp_path):
    model = get_peft_model(LLAMA.make(), half(LLAMA))
    model.push_to_hub("me/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(hub.files["me/adapter"])
    for name, content in hub.files["me/adapter"].items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(logits(PeftModel.from_pretrained(LLAMA.make(), tmp_path), LLAMA), logits(model, LLAMA))
