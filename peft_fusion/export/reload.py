"""Loads exported models where neither this package nor PEFT can be imported, and runs them.

`check.py` gives this file's text to a fresh Python, with a list of jobs in JSON as its argument; so it imports nothing
of the package.
"""

import json
import sys

BLOCKED = ("peft_fusion", "peft")


def run(directory: str, kind: str, inputs: str, outputs: str, away: str = "") -> dict:
    """Loads a checkpoint, and writes what it puts out.

    Args:
        directory: the checkpoint.
        kind: the class of transformers, or auto class, to load it by.
        inputs: safetensors file of the arguments.
        outputs: safetensors file to write.
        away: a folder for what cannot stay where it is, if the weights are to stay on disk; "" for memory.

    Returns:
        What did not fit in loading; empty where all did.
    """
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    on_disk = {"device_map": {"": "disk"}, "offload_folder": away} if away else {}
    model, info = getattr(transformers, kind).from_pretrained(
        directory, trust_remote_code=True, dtype="auto", output_loading_info=True, local_files_only=True, **on_disk
    )
    with torch.no_grad():
        output = model.eval()(**load_file(inputs))
    named = ("logits", "last_hidden_state")
    found = next((output[name] for name in named if name in output), None)
    if found is None:
        found = next(value for value in output.values() if isinstance(value, torch.Tensor))
    save_file({"output": found.float().contiguous()}, outputs)
    return {name: sorted(map(str, keys))[:4] for name, keys in info.items() if keys}


if __name__ == "__main__":
    for name in BLOCKED:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it fails from here on
    print(json.dumps([run(**job) for job in json.loads(sys.argv[1])]))
