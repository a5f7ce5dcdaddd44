"""DeepSpeed ZeRO-3 leaves each process a part of every parameter; imitated here, for it takes GPUs to run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from architectures import BY_NAME
from helpers import half, logits
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from peft_fusion import calibrate, distill, fidelity, tune_layers
from peft_fusion.ffn import find_ffns

LLAMA = BY_NAME["llama_bias"]


def partition(model: nn.Module) -> None:
    """What `deepspeed.zero` does to parameters: the data goes elsewhere, the real shape is in `ds_shape`."""
    for index, parameter in enumerate(p for ffn in find_ffns(model) for m in ffn.projections for p in m.parameters()):
        parameter.ds_id, parameter.ds_shape, parameter.ds_whole = index, parameter.shape, parameter.data
        parameter.data = torch.empty(0, dtype=parameter.dtype)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], modifier_rank: int | None = 0) -> Iterator[None]:
    """Stands in for `deepspeed.zero.GatheredParameters`."""
    assert modifier_rank is None  # reading only
    parameters = list(parameters)
    for parameter in parameters:
        parameter.data = parameter.ds_whole.clone()
    yield
    for parameter in parameters:
        parameter.data.fill_(torch.nan)  # what was not copied is gone
        parameter.data = torch.empty(0, dtype=parameter.dtype)


@pytest.mark.parametrize("base_weights", ["keep", "discard"])
def test_partitioned_weights_are_gathered_for_fusing(base_weights, monkeypatch):
    monkeypatch.setattr("peft_fusion.ffn.storage.gather_params_ctx", gathered)
    expected = logits(get_peft_model(LLAMA.make(), half(LLAMA)), LLAMA)
    model = LLAMA.make()
    partition(model)
    fused = get_peft_model(model, half(LLAMA, base_weights=base_weights))
    assert torch.equal(logits(fused, LLAMA), expected)
    merged = fused.merge_and_unload()
    torch.testing.assert_close(logits(merged, LLAMA), expected)


def test_weights_that_cannot_be_gathered_or_offloaded_are_refused(monkeypatch):
    model = LLAMA.make()
    partition(model)
    with pytest.raises(ValueError, match="cannot be read as a floating-point matrix"):
        get_peft_model(model, half(LLAMA))
    monkeypatch.setattr("peft_fusion.ffn.storage.gather_params_ctx", gathered)
    with pytest.raises(ValueError, match="whose weight is partitioned over processes"):
        get_peft_model(model, half(LLAMA, base_weights="offload"))


@pytest.mark.parametrize(
    "use",
    [
        lambda model: calibrate(model, dataloader=[LLAMA.batch()] * 4),
        lambda model: tune_layers(model, [LLAMA.batch()] * 4),
        lambda model: fidelity(model, [LLAMA.batch()] * 4),
        lambda model: distill(model, [LLAMA.batch()] * 4),
    ],
    ids=["calibrate", "tune_layers", "fidelity", "distill"],
)
def test_what_looks_at_the_whole_model_says_that_it_is_not_there(use, monkeypatch, unchanged):
    monkeypatch.setattr("peft_fusion.ffn.storage.gather_params_ctx", gathered)
    model = LLAMA.make()
    partition(model)
    fused = get_peft_model(model, half(LLAMA))
    check = unchanged(fused)
    with pytest.raises(ValueError, match="holds only a part of the weights of this LlamaForCausalLM .DeepSpeed ZeRO-3"):
        use(fused)
    check()


def test_a_model_sharded_by_fsdp2_is_refused_by_name(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = LLAMA.make()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="holds only a part of the weights.*FSDP2 or tensor parallelism"):
            calibrate(model, half(LLAMA), [LLAMA.batch()] * 4)
    finally:
        dist.destroy_process_group()
