"""Calibrate a model, make its FFNs narrow, distil them for a while and save the adapter: once, for any number of jobs.

    python examples/distributed/prepare.py --model MODEL --data text.txt --adapter adapter
    torchrun --nproc-per-node 2 examples/distributed/prepare.py --model MODEL --data text.txt --adapter adapter

Two processes see half of the data each, and end with the adapter that one process makes.
"""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
from peft import get_peft_model
from text import load, parser_of
from transformers import TrainingArguments

from peft_fusion import FusionConfig, calibrate, distill

CALIBRATION_BATCH = 4  # of each the fourth sequence is held out, on however many ranks


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--ratio", type=float, default=0.25, help="fraction of the neurons kept (default: %(default)s)")
    options = parser.parse_args()
    several, gpu = "RANK" in os.environ, torch.cuda.is_available()
    if several and not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    model, blocks = load(options)
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        model.to("cuda")
    ids = torch.stack([block["input_ids"] for block in blocks])
    batches = [{"input_ids": part} for part in ids.split(CALIBRATION_BATCH)][rank::world]
    config = FusionConfig(ratio=options.ratio, task_type="CAUSAL_LM")
    calibrate(model, config, batches)
    model = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch // world,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            dataloader_drop_last=True,  # else what fills up the last batch of an epoch depends on the ranks
            save_strategy="no",
            report_to="none",
            use_cpu=not gpu,
            disable_tqdm=rank > 0,
        )
        found = distill(model, [{"input_ids": part} for part in ids.split(options.batch)], args=arguments)
    if rank == 0:
        print(f"KL from the original: {found.before:.4f} before, {found.after:.4f} after {options.steps} steps")
        model.save_pretrained(options.adapter)
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
