"""One of two CPU processes that train a fused model together. Started by test_distributed.py."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from architectures import BY_NAME, Architecture
from helpers import half
from moes import MIXTRAL
from peft import get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

MODELS: dict[str, Architecture] = {"llama": BY_NAME["llama"], "mixtral": MIXTRAL}
STEPS = 2

Wrapped = tuple[nn.Module, Callable[[], dict[str, torch.Tensor]]]  # and what gathers its full state dict


def ddp(model: nn.Module) -> Wrapped:
    return DistributedDataParallel(model), lambda: model.state_dict()


def fsdp(model: nn.Module, use_orig_params: bool) -> Wrapped:
    layer = type(model.get_submodule("base_model.model.model.layers.0"))
    by_layer = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={layer})
    # Parameters of a unit must agree in whether they train, unless the originals are kept: PEFT's policy sees to it
    policy = by_layer if use_orig_params else fsdp_auto_wrap_policy(model)
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )

    def gathered() -> dict[str, torch.Tensor]:
        return get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True, cpu_offload=False))

    return wrapped, gathered


def fsdp2(model: nn.Module) -> Wrapped:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.get_submodule("base_model.model.model.layers"):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, lambda: get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


WRAPPERS: dict[str, Callable[[nn.Module], Wrapped]] = {
    "ddp": ddp,
    "fsdp": functools.partial(fsdp, use_orig_params=False),
    "fsdp_orig_params": functools.partial(fsdp, use_orig_params=True),
    "fsdp2": fsdp2,
}


def train(architecture: Architecture, kind: str, base_weights: str, folder: Path) -> None:
    """Fuses, trains on this rank's share of every batch, and writes what this rank ends up with."""
    rank, world = dist.get_rank(), dist.get_world_size()
    folder.mkdir(parents=True, exist_ok=True)
    base = architecture.make()
    torch.manual_seed(100 + rank)  # ranks whose fusing drew from the global generator would come to differ
    model = get_peft_model(base, half(architecture, base_weights=base_weights))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    wrapped, gather = WRAPPERS[kind](model)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        batch = {k: v.chunk(world)[rank] for k, v in architecture.batch(labels=True, seed=step, size=4).items()}
        wrapped(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {name: tensor.detach().clone() for name, tensor in gather().items()}
    torch.save({"start": start, "state": state}, folder / f"rank{rank}.pt")
    if rank == 0:
        model.save_pretrained(folder / "adapter", state_dict=state)
    dist.barrier()


def main(folder: str, *cases: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in cases:
        name, kind, base_weights = case.split("-")
        train(MODELS[name], kind, base_weights, Path(folder, case))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
