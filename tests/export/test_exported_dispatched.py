"""Models that accelerate dispatched are exported as they are in memory, to the byte."""

from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from architectures import BY_NAME
from helpers import half, logits
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_fusion import export, fuse

LLAMA = BY_NAME["llama"]
LAYERS = [f"model.layers.{number}" for number in range(3)]
ENDS = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
PLACES = {
    "disk": dict.fromkeys([*LAYERS, *ENDS], "disk") | {"model.layers.0": "cpu"},
    "half on disk": dict.fromkeys([*LAYERS, *ENDS], "cpu") | {"model.layers.1": "disk", "model.layers.2": "disk"},
}


def dispatched(where, folder, **kwargs):
    model = dispatch_model(LLAMA.make(**kwargs), PLACES[where], main_device="cpu", offload_dir=folder / "away")
    assert any(parameter.is_meta for parameter in model.parameters())
    return model


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def compared(here, there, tmp_path, unchanged, **options):
    export(here, tmp_path / "here" / "small", check=False, **options)
    check = unchanged(there)
    export(there, tmp_path / "there" / "small", check=False, **options)
    check()
    assert files(tmp_path / "there" / "small") == files(tmp_path / "here" / "small")


@pytest.mark.parametrize("where", ["half on disk", pytest.param("disk", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "layers", [pytest.param(None, marks=pytest.mark.slow, id="one width"), pytest.param([1], id="mixed")]
)
def test_as_in_memory(where, layers, tmp_path, unchanged):
    config = half(LLAMA, layers_to_transform=layers)
    there = get_peft_model(dispatched(where, tmp_path), half(LLAMA, layers_to_transform=layers))
    compared(get_peft_model(LLAMA.make(), config), there, tmp_path, unchanged, max_shard_size="20KB")
    assert export(there, tmp_path / "checked").difference < 1e-5


@pytest.mark.parametrize("state", ["merged", "fused", "tied"])
def test_in_whatever_state(state, tmp_path, unchanged):
    kwargs = {"tie_word_embeddings": True} if state == "tied" else {}
    models = [LLAMA.make(**kwargs), dispatched("disk", tmp_path, **kwargs)]
    if state == "fused":
        models = [fuse(model, half(LLAMA)) for model in models]
    else:
        models = [get_peft_model(model, half(LLAMA)) for model in models]
    for model in models if state == "merged" else ():
        model.merge_adapter()
    compared(*models, tmp_path, unchanged)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "there" / "small").config.tie_word_embeddings == bool(kwargs)


def test_loaded_by_a_device_map(tmp_path, unchanged):
    LLAMA.make().save_pretrained(tmp_path / "base")
    here, there = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=where, offload_folder=tmp_path / "away")
        for where in ("cpu", PLACES["half on disk"])
    )
    assert there.model.layers[1].mlp.up_proj.weight.is_meta
    compared(get_peft_model(here, half(LLAMA)), get_peft_model(there, half(LLAMA)), tmp_path, unchanged)


def test_adapters_that_are_elsewhere_too(tmp_path, unchanged):
    """PEFT dispatches the model anew once it has loaded an adapter, which then lies where its layer does."""
    both = get_peft_model(LLAMA.make(), half(LLAMA), adapter_name="narrow", mixed=True)
    both.add_adapter("lora", LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    both.set_adapter(["narrow", "lora"])
    host = both.base_model.model
    expected = logits(host, LLAMA)
    export(both, tmp_path / "here" / "small", check=False)
    there = dispatch_model(host, PLACES["disk"], main_device="cpu", offload_dir=tmp_path / "away")
    assert sum("lora_A" in name and p.is_meta for name, p in there.named_parameters()) == 4
    assert torch.equal(logits(there, LLAMA), expected)
    check = unchanged(there)
    export(there, tmp_path / "there" / "small", check=False)
    check()
    assert files(tmp_path / "there" / "small") == files(tmp_path / "here" / "small")


def test_an_adapter_loaded_by_peft(tmp_path, unchanged):
    here = get_peft_model(LLAMA.make(), half(LLAMA))
    here.save_pretrained(tmp_path / "adapter")
    there = PeftModel.from_pretrained(
        dispatched("disk", tmp_path), tmp_path / "adapter", offload_folder=tmp_path / "again"
    )
    compared(here, there, tmp_path, unchanged)


def test_what_no_hook_fetches_is_refused(tmp_path):
    model = get_peft_model(dispatched("disk", tmp_path), half(LLAMA))
    norm = model.base_model.model.model.norm
    add_hook_to_module(norm, norm._hf_hook, append=True)  # a sequence of hooks fetches as well
    export(model, tmp_path / "small", check=False)
    remove_hook_from_module(norm)
    norm.to("meta")
    with pytest.raises(ValueError, match="`model.norm.weight` has no weights"):
        export(model, tmp_path / "other")
