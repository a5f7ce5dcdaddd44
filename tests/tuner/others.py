"""What users of other methods see, mistakes included: printed by `main`, with this package imported or without it."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from architectures import BY_NAME
from peft import IA3Config, LoraConfig, PeftConfig, PeftMixedModel, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

LLAMA = BY_NAME["llama"]


def lora(target: str = "q_proj", **settings: Any) -> LoraConfig:
    return LoraConfig(target_modules=[target], r=2, **settings)


def scenarios(folder: Path) -> Iterator[tuple[str, Callable[[nn.Module], Any]]]:
    """A name, and what is done with a fresh model."""
    good, damaged = folder / "good", folder / "damaged"
    for path in (good, damaged):
        torch.manual_seed(1)
        get_peft_model(LLAMA.make(), lora(init_lora_weights=False)).save_pretrained(path)
    file = damaged / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])

    yield "good", lambda model: get_peft_model(model, lora())
    yield "good, IA3", lambda model: get_peft_model(model, IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    yield "mixed", lambda model: get_peft_model(model, lora(), mixed=True)
    yield "no such target", lambda model: get_peft_model(model, lora("nosuch"))
    yield "no such target, mixed", lambda model: get_peft_model(model, lora("nosuch"), mixed=True)
    yield "injected", lambda model: inject_adapter_in_model(lora("nosuch"), model)
    yield "added", lambda model: model.add_adapter(lora("nosuch"))
    yield "added, then another", lambda model: (model.add_adapter(lora(), "a"), model.add_adapter(lora("nosuch"), "b"))
    yield "the same name", lambda model: (model.add_adapter(lora(), "a"), model.add_adapter(lora(), "a"))
    yield "the same name, injected", lambda model: [inject_adapter_in_model(lora(t), model) for t in ("q_proj", "x")]
    yield "second", lambda model: get_peft_model(model, lora()).add_adapter("b", lora("nosuch"))
    yield "second, mixed", lambda model: get_peft_model(model, lora(), mixed=True).add_adapter("b", lora("nosuch"))
    yield "another type", lambda model: get_peft_model(model, lora()).add_adapter("b", IA3Config())
    yield "not for mixed", lambda model: get_peft_model(model, IA3Config(), mixed=True)
    yield "loaded", lambda model: PeftModel.from_pretrained(model, good)
    yield "loaded, mixed", lambda model: PeftMixedModel.from_pretrained(model, good)
    yield "loaded natively", lambda model: model.load_adapter(str(good))
    yield "loaded with its configuration", lambda model: PeftModel.from_pretrained(model, good, config=lora("v_proj"))
    yield "loaded beside", lambda model: get_peft_model(model, lora()).load_adapter(good, "b")
    yield "loaded onto", lambda model: get_peft_model(model, lora()).load_adapter(good, "default")
    yield "its configuration", lambda model: vars(PeftConfig.from_pretrained(good))
    yield "damaged", lambda model: PeftModel.from_pretrained(model, damaged)
    yield "damaged natively", lambda model: model.load_adapter(str(damaged))
    yield "damaged onto", lambda model: get_peft_model(model, lora()).load_adapter(damaged, "default")
    yield "no such folder", lambda model: PeftModel.from_pretrained(model, folder / "nosuch")
    yield "no such folder natively", lambda model: model.load_adapter(str(folder / "nosuch"))
    yield "no such argument", lambda model: PeftModel.from_pretrained(model, good, nosuch=1)
    yield "an argument is missing", lambda model: PeftModel.from_pretrained(model)
    yield "an argument is missing, too", lambda model: get_peft_model(model, lora()).load_adapter(good)
    yield "too many arguments", lambda model: model.load_adapter(*range(12))


def outcome(act: Callable[[nn.Module], Any], folder: Path) -> dict[str, Any]:
    """What came of it: the result or the error, the warnings, and the model afterwards."""
    model = LLAMA.make()
    torch.manual_seed(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = act(model)
            said = described(result)
        except Exception as error:  # whatever it is, it is compared
            said = f"{type(error).__module__}.{type(error).__qualname__}: {error}"
    return {
        "said": said.replace(str(folder), "FOLDER"),
        "warned": [str(w.message).replace(str(folder), "FOLDER") for w in caught],
        "adapters": sorted(getattr(model, "peft_config", None) or []),
        "noted": getattr(model, "_hf_peft_config_loaded", None),
        "attributes": sorted(vars(model)),
        "modules": [
            f"{name}: {type(module).__module__}.{type(module).__name__}" for name, module in model.named_modules()
        ],
        "state": {name: float(tensor.sum()) for name, tensor in model.state_dict().items()},
        "trains": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "random": torch.rand(1).item(),
    }


def described(result: Any) -> str:
    if not isinstance(result, nn.Module):
        return repr(result)
    tuner = getattr(result, "base_model", result)
    return f"{type(result).__module__}.{type(result).__name__}, {type(tuner).__module__}.{type(tuner).__name__}"


def main(folder: str, package: str) -> None:
    torch.set_num_threads(1)
    if package:
        __import__(package)
    found = {name: outcome(act, Path(folder)) for name, act in scenarios(Path(folder))}
    Path(folder, "found.json").write_text(json.dumps(found))
    assert bool(package) == any(name.startswith("peft_fusion") for name in sys.modules)


if __name__ == "__main__":
    main(*sys.argv[1:])
