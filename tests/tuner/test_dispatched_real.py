"""SmolLM2 with half of its layers on disk: calibrated, trained a step and exported as it is in memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from peft import get_peft_model

from peft_fusion import FusionConfig, calibrate, export


def made(model: torch.nn.Module, folder: Path) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model of which two FFNs are narrow, after a step of training, and what it puts out; exported to a folder."""
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 49152, (2, 16), generator=generator)} for _ in range(2)]
    config = FusionConfig(ratio=0.5, layers_to_transform=[14, 28], task_type="CAUSAL_LM")
    calibrate(model, config, batches, ffns_per_pass=1)
    fused = get_peft_model(model, config)
    fused(**batches[0], labels=batches[0]["input_ids"]).loss.backward()
    torch.optim.SGD([p for p in fused.parameters() if p.requires_grad], lr=1e-3).step()
    export(fused, folder, check=False)
    with torch.no_grad():
        return fused, fused.eval()(**batches[1]).logits


@pytest.mark.slow
@pytest.mark.real
def test_half_of_the_layers_on_disk(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    from common.errors import InputError
    from common.load_models import load_causal_lm

    try:
        here, _ = load_causal_lm(None)
    except InputError as error:
        pytest.skip(str(error))
    there = copy.deepcopy(here)  # reading a GGUF file takes twenty seconds
    places = {f"model.layers.{i}": "cpu" if i < 15 else "disk" for i in range(30)}
    places |= dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    dispatch_model(there, places, main_device="cpu", offload_dir=tmp_path / "away")
    assert there.model.layers[28].mlp.up_proj.weight.is_meta
    (fused, expected), (other, found) = made(here, tmp_path / "here"), made(there, tmp_path / "there")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    pairs = zip(fused.parameters(), other.parameters(), strict=True)
    for mine, theirs in ((a, b) for a, b in pairs if a.requires_grad):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4 * float(mine.detach().abs().max()))
    names = [path.name for path in (tmp_path / "here").iterdir()]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "there").iterdir())
