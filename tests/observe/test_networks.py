"""Looking at a network: whatever is around it, nothing of it changes."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from architectures import BY_NAME
from helpers import half, logits, relative
from peft import LoraConfig, PeftMixedModel, get_peft_model
from torch import nn

from peft_fusion.ffn import find_ffns
from peft_fusion.observe.networks import Network, is_out_of_memory
from peft_fusion.observe.pair import pair
from peft_fusion.observe.unwrap import unwrapped

LLAMA = BY_NAME["llama"]


def test_every_wrapper_is_taken_off(monkeypatch):
    host = LLAMA.make()
    assert unwrapped(host) is host
    model = get_peft_model(host, half(LLAMA))
    assert unwrapped(model) is host and unwrapped(model.base_model) is host
    assert unwrapped(torch.compile(model, backend="eager")) is host
    assert unwrapped(Accelerator(cpu=True, mixed_precision="bf16").prepare(model)) is host
    mixed = get_peft_model(LLAMA.make(), half(LLAMA), mixed=True)
    assert isinstance(mixed, PeftMixedModel)
    mixed.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
    assert type(unwrapped(mixed)).__name__ == "LlamaForCausalLM"


def test_unwrapping_leaves_the_wrapper_working():
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare(get_peft_model(LLAMA.make(), half(LLAMA)))
    forward = model.forward
    unwrapped(model)
    assert model.forward is forward or model.forward == forward


@pytest.mark.parametrize("fused", [False, True])
def test_a_merged_adapter_stays_merged(fused):
    host = LLAMA.make()
    original = logits(host, LLAMA)
    model = get_peft_model(host, half(LLAMA))
    narrow = logits(model, LLAMA)
    model.merge_adapter()
    merged = logits(model, LLAMA)
    model.train()
    network = Network(host, find_ffns(host), fused)
    with network.running(), torch.no_grad():
        seen = network(LLAMA.batch()).logits
    assert relative(seen, narrow if fused else original) < 1e-6
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(logits(model, LLAMA), merged)


def test_offloaded_weights_are_offloaded_again():
    host = LLAMA.make()
    original = logits(host, LLAMA)
    model = get_peft_model(host, half(LLAMA, base_weights="offload"))
    network, _ = pair(model, None)
    with network.running(), torch.no_grad():
        assert torch.equal(network(LLAMA.batch()).logits, original)
    assert all(p.numel() == 0 for ffn in find_ffns(host) for m in ffn.base_projections for p in m.parameters())


def test_what_is_trainable_and_in_which_mode_stays(unchanged):
    model = get_peft_model(LLAMA.make(), half(LLAMA)).train()
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    network, _ = pair(model, None)
    with pytest.raises(KeyboardInterrupt), network.running():
        assert not any(p.requires_grad for p in model.parameters())
        raise KeyboardInterrupt
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert all(module.training for module in model.modules())


def test_a_batch_that_the_model_cannot_take_is_told_apart_from_full_memory(monkeypatch):
    host = LLAMA.make()
    network = Network(host, find_ffns(host), False)
    with pytest.raises(ValueError, match=r"cannot take a batch with \['pixels'\].*arguments \['input_ids'"):
        network({"pixels": torch.ones(2, 3)})

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(host.model, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        network(LLAMA.batch())


def test_memory_that_runs_out():
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**60)
    assert is_out_of_memory(failure.value) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_nothing_to_compare_with():
    with pytest.raises(ValueError, match="no active fusion adapter"):
        pair(nn.Linear(2, 2), None)
    model = get_peft_model(LLAMA.make(), half(LLAMA, base_weights="discard"))
    with pytest.raises(RuntimeError, match="were dropped"):
        pair(model, None)


def test_tied_weights_on_disk_are_run_and_left_as_they_were(tmp_path):
    host = LLAMA.make(tie_word_embeddings=True)
    host.save_pretrained(tmp_path / "model")
    expected = logits(host, LLAMA)
    model = type(host).from_pretrained(tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "away")
    before = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    network = Network(model, find_ffns(model), fused=False)
    with network.running(), torch.no_grad():
        found = network(LLAMA.batch()).logits
    torch.testing.assert_close(found, expected)
    assert {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)} == before
