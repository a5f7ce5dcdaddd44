"""One of two CPU processes of `accelerate launch`, which run scripts of examples/distributed one after another.

accelerate shards on accelerators alone; it is told here that CPUs are some. All else, `fully_shard` and DeepSpeed's
ZeRO-3 over gloo, the trainer's checkpoints and what gathers parameters, is what runs on GPUs.
"""

from __future__ import annotations

import os
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

SCRIPTS = Path(__file__).parents[2] / "examples" / "distributed"
plain_init = AcceleratorState.__init__


def init_sharding(self: AcceleratorState, *given: Any, fsdp_plugin: Any = None, **named: Any) -> None:
    plain_init(self, *given, fsdp_plugin=fsdp_plugin, **named)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def main(*commands: str) -> None:
    AcceleratorState.__init__ = init_sharding
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
    dist.init_process_group("gloo")  # one for all scripts: a second one would find the keys of the first
    destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    sys.path.insert(0, str(SCRIPTS))
    for command in commands:
        script, *arguments = shlex.split(command)
        sys.argv = [script, *arguments]
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        AcceleratorState._reset_state(reset_partial_state=True)
        dist.barrier()  # what one has saved is there for all
    destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])
