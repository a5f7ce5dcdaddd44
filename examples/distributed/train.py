"""Train an adapter that was made once, in every rank of a job: DDP, FSDP2 or DeepSpeed ZeRO-3.

    accelerate launch --config_file examples/distributed/ddp.yaml examples/distributed/train.py \\
        --model MODEL --data text.txt --adapter adapter --output run
    accelerate launch --config_file examples/distributed/fsdp2.yaml ...    the same, parameters in parts
    accelerate launch --config_file examples/distributed/zero3.yaml ...    the same by DeepSpeed
    ... --resume run/checkpoint-10                                         goes on from there

`prepare.py` makes the adapter. No rank clusters or calibrates anything: each reads the narrow weights from the file.
What is saved in the end, `run/adapter`, is whole, and loads on one machine.
"""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from text import load, parser_of
from transformers import Trainer, TrainingArguments

import peft_fusion  # noqa: F401  PEFT knows its adapters by it


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the trained adapter")
    parser.add_argument("--save-steps", type=int, default=10, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--resume", help="a checkpoint to go on from")
    options = parser.parse_args()
    arguments = TrainingArguments(  # before the model is loaded: DeepSpeed has it loaded in parts
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=1,
        learning_rate=options.learning_rate,
        save_steps=options.save_steps,
        logging_steps=options.save_steps,
        report_to="none",
    )
    arguments.per_device_train_batch_size = options.batch // arguments.world_size
    model, blocks = load(options)
    model = PeftModel.from_pretrained(model, options.adapter, is_trainable=True)
    trainer = Trainer(model, arguments, train_dataset=blocks)
    trainer.train(resume_from_checkpoint=options.resume)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # every rank has a part in it
    if trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model_wrapped).save_pretrained(
            options.output / "adapter", state_dict=state
        )


if __name__ == "__main__":
    main()
