"""SmolLM2 with half of its layers on disk, in less memory than its weights take: it gives what it gives in memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_fusion import FusionConfig, calibrate, export


def work(model: torch.nn.Module, folder: Path) -> None:
    """Calibrates and narrows two FFNs, trains a step and exports; writes what is trained, and what it puts out."""
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 49152, (2, 16), generator=generator)} for _ in range(2)]
    config = FusionConfig(ratio=0.5, layers_to_transform=[14, 28], task_type="CAUSAL_LM")
    calibrate(model, config, batches, ffns_per_pass=1)
    fused = get_peft_model(model, config)
    fused(**batches[0], labels=batches[0]["input_ids"]).loss.backward()
    torch.optim.SGD([p for p in fused.parameters() if p.requires_grad], lr=1e-3).step()
    export(fused, folder / "exported", check=False, max_shard_size="50MB")
    trained = {name: p.detach().clone() for name, p in fused.named_parameters() if p.requires_grad}
    with torch.no_grad():
        save_file(trained | {"logits": fused.eval()(**batches[1]).logits}, folder / "found.safetensors")


class Peak(Thread):
    """The most memory of this process that no file backs, in bytes, looked at a hundred times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.over = 0, Event()

    def run(self) -> None:
        while not self.over.wait(0.01):
            self.look()

    def look(self) -> int:
        found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
        held = 1024 * int(found[1])
        self.most = max(self.most, held)
        return held


def main(checkpoint: Path, folder: Path) -> None:
    """In a process of its own, with half of the layers on disk; prints the memory that it took beyond libraries."""
    torch.set_num_threads(1)
    places: dict[str, str] = {f"model.layers.{i}": "cpu" if i < 15 else "disk" for i in range(30)}
    places |= dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    peak = Peak()
    before = peak.look()
    peak.start()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=places, offload_folder=folder / "away")
    assert model.model.layers[28].mlp.up_proj.weight.is_meta
    for parameter in model.parameters():  # transformers maps the files of those in memory
        parameter.data = parameter.data if parameter.is_meta else parameter.data.clone()
    loaded = peak.look() - before
    work(model, folder)
    peak.over.set()
    print(json.dumps({"loaded": loaded, "most": peak.most - before}))


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(sys.platform != "linux", reason="memory is told as Linux does it")
def test_half_of_the_layers_on_disk_in_less_memory_than_the_weights_take(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    from common.errors import InputError
    from common.load_models import load_causal_lm

    try:
        model, _ = load_causal_lm(None)
    except InputError as error:
        pytest.skip(str(error))
    folders = {name: tmp_path / name for name in ("checkpoint", "here", "there")}
    model.save_pretrained(folders["checkpoint"])
    for name in ("here", "there"):
        folders[name].mkdir()
    work(model, folders["here"])
    command = [sys.executable, __file__, str(folders["checkpoint"]), str(folders["there"])]
    there = subprocess.run(command, capture_output=True, text=True)
    assert there.returncode == 0, there.stderr[-3000:]
    memory, weights = json.loads(there.stdout.splitlines()[-1]), sum(p.nbytes for p in model.parameters())
    assert 0.4 * weights < memory["loaded"] < memory["most"] < weights, memory
    found, expected = (load_file(folders[name] / "found.safetensors") for name in ("there", "here"))
    assert found.keys() == expected.keys() and len(found) > 6
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4 * float(tensor.abs().max()))
    files = [sorted(path.name for path in (folders[name] / "exported").iterdir()) for name in ("here", "there")]
    assert files[0] == files[1]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
