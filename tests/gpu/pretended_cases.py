"""What must hold on any accelerator, on a pretended one. Run by test_pretended.py, in a process of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from architectures import BY_NAME, Architecture
from helpers import half, logits
from peft import get_peft_model
from pretended import DEVICE, Device, WrongDevice, held, on_device
from torch import Tensor, nn

from peft_fusion import FusionConfig, calibrate, fidelity, fuse, tune_layers
from peft_fusion.distill.predictions import Predictions
from peft_fusion.observe.own_inputs import own_inputs

NAMES = ["llama", "bert", "t5_gated", "gpt2"]


@pytest.fixture
def device() -> Iterator[Device]:
    with Device() as device:
        yield device


def batches(architecture: Architecture, count: int) -> list[dict[str, Tensor]]:
    return [architecture.batch(seed=seed, size=4) for seed in range(count)]


def moved(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in batch.items()}


def made(architecture: Architecture) -> nn.Module:
    return on_device(architecture.make(attn_implementation="eager"))


def own_waits(device: Device, work: Callable[[], object]) -> Counter[str]:
    """Where the package, and not the host model, has the host wait while it works."""
    device.waits.clear()
    work()
    return Counter(wait for wait in device.waits if not wait.startswith("elsewhere"))


def test_operands_on_two_devices_are_refused(device: Device):
    with pytest.raises(WrongDevice, match="operands on two devices"):
        torch.ones(2, device=DEVICE) + torch.ones(2)
    with pytest.raises(WrongDevice, match="a generator of the CPU"):
        torch.rand(2, device=DEVICE, generator=torch.Generator())
    assert float(torch.ones(2, device=DEVICE).sum() * torch.tensor(2.0)) == 4.0
    assert len(device.waits) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("calibrated", [False, True], ids=["weights", "calibrated"])
def test_fused_there_is_as_fused_on_the_cpu(name: str, calibrated: bool, device: Device):
    architecture = BY_NAME[name]
    fused = []
    for model in (architecture.make(attn_implementation="eager"), made(architecture)):
        config = half(architecture)
        if calibrated:
            calibrate(model, config, batches(architecture, 2))
        fused.append(get_peft_model(model, config))
    for tensor in (*fused[1].parameters(), *fused[1].buffers()):
        assert tensor.device == DEVICE
    batch = moved(architecture.batch())
    with torch.no_grad():
        found = fused[1](**batch).logits
        torch.testing.assert_close(held(found), logits(fused[0], architecture), rtol=1e-3, atol=1e-3)
        with fused[1].disable_adapter():
            assert fused[1](**batch).logits.device == DEVICE
    merged = fused[1].merge_and_unload()
    assert all(parameter.device == DEVICE for parameter in merged.parameters())
    torch.testing.assert_close(held(merged(**batch).logits), held(found), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_training_never_waits(name: str, device: Device):
    architecture = BY_NAME[name]
    fused = get_peft_model(made(architecture), half(architecture)).train()
    adam = torch.optim.AdamW([p for p in fused.parameters() if p.requires_grad], lr=1e-3)
    batch = moved(architecture.batch(labels=True))

    def step() -> None:
        fused(**batch).loss.backward()
        adam.step()
        adam.zero_grad()

    assert not own_waits(device, step)


def test_a_pass_over_the_data_waits_as_often_however_many_batches_there_are(device: Device):
    from peft_fusion.calibrate.collect import collect
    from peft_fusion.calibrate.inputs import Inputs
    from peft_fusion.ffn import find_ffns
    from peft_fusion.observe.networks import Network

    llama = BY_NAME["llama"]
    model = made(llama)
    network = Network(model, find_ffns(model), fused=False)
    found = []
    with network.running():
        for count in (2, 5):
            found.append(own_waits(device, lambda count=count: collect(network, Inputs(batches(llama, count), "data"))))
    while_running = {wait for wait in found[1] if "networks.py" in wait}  # the host model's own, reached through it
    assert {w: n for w, n in found[0].items() if w not in while_running} == {
        w: n for w, n in found[1].items() if w not in while_running
    }


def test_tuning_hidden_states_waits_once(device: Device):
    llama = BY_NAME["llama"]
    fused = get_peft_model(made(llama), half(llama))
    for count in (2, 4):
        waits = own_waits(
            device, lambda count=count: tune_layers(fused, batches(llama, count), objective="hidden_states")
        )
        assert sum(number for wait, number in waits.items() if "tune/" in wait) == 1


def test_tuning_each_ffn(device: Device):
    llama = BY_NAME["llama"]
    fused = get_peft_model(made(llama), half(llama))
    tune_layers(fused, batches(llama, 4), steps=3, tokens=40)
    assert all(parameter.device == DEVICE for parameter in fused.parameters())


def test_own_text_fidelity_and_one_shot_fusion(device: Device):
    llama = BY_NAME["llama"]
    assert len(own_inputs(made(llama), 4, 6, seed=0)) == 1
    fused = get_peft_model(made(llama), half(llama))
    report = fidelity(fused, batches(llama, 2))
    assert report.divergence > 0
    model = made(llama)
    fuse(model, half(llama))
    assert all(parameter.device == DEVICE for parameter in model.parameters())


def test_distilled_predictions_never_wait_where_there_is_no_padding(device: Device):
    llama = BY_NAME["llama"]
    fused = get_peft_model(made(llama), half(llama))
    predictions = Predictions("logits", is_encoder_decoder=False)
    batch = moved({"input_ids": llama.batch()["input_ids"]})

    def step() -> None:
        with torch.no_grad():
            theirs = predictions.of(fused, batch)
        predictions.distance(predictions.of(fused, batch) * 1.1, theirs).backward()

    assert not {wait for wait in own_waits(device, step) if "networks.py" not in wait}


def test_two_adapters(device: Device):
    llama = BY_NAME["llama"]
    fused = get_peft_model(made(llama), half(llama))
    fused.add_adapter("quarter", FusionConfig(ratio=0.25, task_type="CAUSAL_LM"))
    batch, found = moved(llama.batch()), []
    for name in ("default", "quarter"):
        fused.set_adapter(name)
        found.append(held(fused(**batch).logits))
    assert not torch.equal(*found)
