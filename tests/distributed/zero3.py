"""One of two CPU processes that train an adapter under DeepSpeed ZeRO-3. Started by test_zero3.py."""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from architectures import BY_NAME
from helpers import half
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

LLAMA = BY_NAME["llama"]
STEPS = 2
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 1e-2, "torch_adam": True}},
}


def main(folder: str) -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes
    deepspeed.init_distributed("gloo")
    partitions = HfDeepSpeedConfig(CONFIG)  # transformers loads in parts as long as there is one
    base = type(LLAMA.make()).from_pretrained(Path(folder, "base"))
    assert all(parameter.numel() == 0 for parameter in base.parameters())
    fused = get_peft_model(base, half(LLAMA))  # from weights that are gathered
    state = {name: p.detach().clone() for name, p in fused.named_parameters() if p.requires_grad}
    torch.save(state, Path(folder, f"fused{dist.get_rank()}.pt"))
    base = fused.unload()
    model = PeftModel.from_pretrained(base, Path(folder, "adapter"), is_trainable=True)
    train(model, Path(folder, "trained"))
    del partitions
    dist.destroy_process_group()


def train(model: PeftModel, folder: Path) -> None:
    """Two steps on this rank's share of every batch; what is saved is gathered."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG, model_parameters=trained)
    for step in range(STEPS):
        batch = {k: v.chunk(2)[dist.get_rank()] for k, v in LLAMA.batch(labels=True, seed=step, size=4).items()}
        engine.backward(engine(**batch).loss)
        engine.step()
    state = engine._zero3_consolidated_16bit_state_dict()
    if dist.get_rank() == 0:
        host = model.get_base_model()
        assert isinstance(host, PreTrainedModel)
        model.save_pretrained(folder, state_dict=state)


if __name__ == "__main__":
    main(*sys.argv[1:])
