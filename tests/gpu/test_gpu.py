"""On a real CUDA device, where there is one: the same results as on a CPU, in every precision, and no needless waiting.

`PEFT_FUSION_GPU_TESTS=cpu` runs them on the CPU, as far as it can, to see that they work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from architectures import BY_NAME, Architecture
from helpers import half, logits, relative
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening

from peft_fusion import FusionConfig, calibrate, distill, fidelity, tune_layers

DEVICE = os.environ.get("PEFT_FUSION_GPU_TESTS", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device"),
]
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="a CPU has none of it")
NAMES = ["llama", "bert", "t5_gated", "gpt2"]
LLAMA = BY_NAME["llama"]


def batches(architecture: Architecture, count: int = 4) -> list[dict[str, Tensor]]:
    return [architecture.batch(seed=seed, size=4) for seed in range(count)]


def there(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in batch.items()}


def calibrated(model: nn.Module, architecture: Architecture, **settings: object) -> PeftModel:
    config = half(architecture, **settings)
    calibrate(model, config, batches(architecture))
    return get_peft_model(model, config)


def outputs(model: nn.Module, architecture: Architecture) -> Tensor:
    with torch.no_grad():
        return model.eval()(**there(architecture.batch())).logits.float().cpu()


@contextmanager
def no_waiting() -> Iterator[None]:
    """torch raises where the host waits for the device."""
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_twice_and_what_a_cpu_makes(name: str):
    architecture = BY_NAME[name]
    first, second = (calibrated(architecture.make().to(DEVICE), architecture) for _ in range(2))
    for (key, tensor), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), key
    on_cpu = logits(calibrated(architecture.make(), architecture), architecture)
    assert relative(outputs(first, architecture), on_cpu) < 0.05  # a near tie may be decided otherwise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype):
    model = calibrated(LLAMA.make().to(DEVICE, dtype), LLAMA)
    assert torch.isfinite(outputs(model, LLAMA)).all()
    expected = logits(calibrated(LLAMA.make(), LLAMA), LLAMA)
    assert relative(outputs(model, LLAMA), expected) < 0.1
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}


@pytest.mark.parametrize("name", NAMES)
def test_training_under_autocast_never_waits(name: str):
    architecture = BY_NAME[name]
    model = calibrated(architecture.make().to(DEVICE), architecture).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=1e-3, capturable=DEVICE == "cuda")
    batch = there(architecture.batch(labels=True))
    batch.pop("attention_mask", None)  # the host looks at it
    for step in range(3):
        with no_waiting() if step else no_waiting_yet():
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            adam.step()
            adam.zero_grad()
    assert all(torch.isfinite(parameter).all() for parameter in trained)


@contextmanager
def no_waiting_yet() -> Iterator[None]:
    """The first step sets up."""
    yield


def test_compiled():
    model = calibrated(LLAMA.make().to(DEVICE), LLAMA)
    compiled = torch.compile(model, backend="inductor" if DEVICE == "cuda" else "eager")
    with torch.no_grad():
        found = compiled(**there(LLAMA.batch())).logits.float().cpu()
    torch.testing.assert_close(found, outputs(model, LLAMA), rtol=1e-3, atol=1e-3)


@needs_cuda
def test_statistics_collected_there_are_moved():
    from peft_fusion.calibrate.collect import collect
    from peft_fusion.calibrate.inputs import Inputs
    from peft_fusion.ffn import find_ffns
    from peft_fusion.observe.networks import Network

    model = LLAMA.make().to(DEVICE)
    network = Network(model, find_ffns(model), fused=False)
    with network.running():
        found = collect(network, Inputs(batches(LLAMA), "data"))
    before = torch.cuda.memory_allocated()
    moved = {name: statistics.cpu() for name, statistics in found.items()}
    assert torch.cuda.memory_allocated() < before
    assert all(statistics.product.device.type == "cpu" for statistics in moved.values())


def test_learning_there(tmp_path: Path):
    model = calibrated(LLAMA.make().to(DEVICE), LLAMA)
    tune_layers(model, batches(LLAMA), steps=4, tokens=60)
    tune_layers(model, batches(LLAMA), objective="hidden_states")
    before, after = (found := distill(model, batches(LLAMA, 8))).before, found.after
    assert after <= before
    assert fidelity(model, batches(LLAMA, 2)).divergence >= 0
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.make().to(DEVICE), tmp_path)
    assert torch.equal(outputs(loaded, LLAMA), outputs(model, LLAMA))


def test_two_adapters():
    model = calibrated(LLAMA.make().to(DEVICE), LLAMA)
    model.add_adapter("quarter", FusionConfig(ratio=0.25, task_type="CAUSAL_LM"))
    found = []
    for name in ("default", "quarter", "default"):
        model.set_adapter(name)
        found.append(outputs(model, LLAMA))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


@needs_cuda
def test_device_map(tmp_path: Path):
    LLAMA.make().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert relative(outputs(calibrated(model, LLAMA), LLAMA), logits(calibrated(LLAMA.make(), LLAMA), LLAMA)) < 0.05


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_sequences_packed_into_one(attention: str):
    """What Flash attention's varlen kernels take: one row of tokens, and where each sequence ends."""
    dtype = torch.float32
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
        dtype = torch.bfloat16
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=attention != "sdpa", return_tensors="pt")
    packed = []
    for batch in batches(LLAMA, 8):
        packed.append({k: v for k, v in collator([{"input_ids": ids.tolist()} for ids in batch["input_ids"]]).items()})
    model = LLAMA.make(attn_implementation=attention).to(DEVICE, dtype)
    config = half(LLAMA)
    calibrate(model, config, packed)
    fused = get_peft_model(model, config).train()
    batch = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in packed[0].items()}
    fused(**batch).loss.backward()
    assert torch.isfinite(outputs(fused, LLAMA)).all()
