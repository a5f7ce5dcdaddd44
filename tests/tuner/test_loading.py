"""Loading an adapter: its tensors decide, on every way there is, and whatever the configuration says."""

from __future__ import annotations

import copy
import json
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import BY_NAME, Architecture
from helpers import half, logits, train
from huggingface_hub import hf_hub_download
from packaging import version
from peft import (
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from peft_fusion import FusionConfig, calibrate

LLAMA = BY_NAME["llama"]
KINDS = ["calibrated", "uncalibrated", "no scale", "low rank"]
SCALES = {"calibrated": "ntk", "uncalibrated": "counts", "no scale": "none", "low rank": "none"}


def make(kind: str, architecture: Architecture = LLAMA) -> PeftModel:
    """A trained adapter of half width, with scales everywhere, after the activation alone, or nowhere."""
    return copy.deepcopy(made(kind, architecture.name))


@lru_cache
def made(kind: str, name: str) -> PeftModel:
    architecture = BY_NAME[name]
    settings = {"no scale": {"scale": "none"}, "low rank": {"method": "svd"}}
    model, config = architecture.make(), half(architecture, **settings.get(kind, {}))
    if kind == "calibrated":
        calibrate(model, config, [architecture.batch(labels=True, seed=seed, size=8) for seed in range(4)])
    model = get_peft_model(model, config)
    train(model, architecture)
    return model


@pytest.fixture(scope="module", params=[*KINDS, "calibrated, bin"])
def adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, str]:
    """A saved adapter, its logits, and what is recorded of its scales."""
    kind, folder = request.param.split(",")[0], tmp_path_factory.mktemp("adapter")
    model = make(kind)
    model.save_pretrained(folder, safe_serialization="bin" not in request.param)
    return folder, logits(model, LLAMA), SCALES[kind]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    file = folder / "adapter_model.safetensors"
    return load_file(file) if file.exists() else torch.load(folder / "adapter_model.bin", weights_only=True)


def from_pretrained(folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(LLAMA.make(), folder)


def from_pretrained_without_memory(folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(LLAMA.make(), folder, low_cpu_mem_usage=True)


def from_pretrained_with_a_new_config(folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(LLAMA.make(), folder, config=FusionConfig(task_type="CAUSAL_LM"))


def from_pretrained_with_its_config(folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(LLAMA.make(), folder, config=PeftConfig.from_pretrained(folder))


def beside_another(folder: Path) -> nn.Module:
    model = get_peft_model(LLAMA.make(), FusionConfig(ratio=0.25, init_weights=False))
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    model.delete_adapter("default")
    return model


def mixed(folder: Path) -> nn.Module:
    return PeftMixedModel.from_pretrained(LLAMA.make(), folder)


def native(folder: Path, model: nn.Module | None = None, **settings: Any) -> nn.Module:
    model = LLAMA.make() if model is None else model
    if not (folder / "adapter_model.safetensors").exists():
        settings.setdefault("use_safetensors", False)  # else transformers does not find what lies in a folder
    model.load_adapter(str(folder), **settings)
    return model


def native_with_a_new_config(folder: Path) -> nn.Module:
    return native(folder, peft_config=FusionConfig())


def native_from_tensors(folder: Path) -> nn.Module:
    model = LLAMA.make()
    model.load_adapter(peft_config=FusionConfig(), adapter_state_dict=tensors_of(folder))
    return model


def injected(folder: Path, low: bool = False) -> nn.Module:
    tensors = tensors_of(folder)
    model = inject_adapter_in_model(FusionConfig(), LLAMA.make(), state_dict=tensors, low_cpu_mem_usage=low)
    result = set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=low)
    assert not result.unexpected_keys
    return model


def injected_without_memory(folder: Path) -> nn.Module:
    return injected(folder, low=True)


WAYS = [
    from_pretrained,
    from_pretrained_without_memory,
    from_pretrained_with_a_new_config,
    from_pretrained_with_its_config,
    beside_another,
    mixed,
    native,
    native_with_a_new_config,
    native_from_tensors,
    injected,
    injected_without_memory,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_gives_the_saved_outputs(way, adapter, monkeypatch, tmp_path):
    folder, expected, scale = adapter
    monkeypatch.setattr("peft_fusion.tuner.make.fused_projections", lambda *_: pytest.fail("loading clustered"))
    model = way(folder)
    assert torch.equal(logits(model, LLAMA), expected)
    config = next(iter(model.peft_config.values()))
    assert config.fused_by["scale"] == scale
    assert (config.fused_by["method"] == "svd") == ("weight_in" in str(list(model.state_dict())))
    assert scale == "none" or set(map(tuple, config.fused_widths.values())) == {(64, 32)}
    if isinstance(model, PeftModel):
        model.save_pretrained(tmp_path)
        (saved,) = tmp_path.rglob("adapter_config.json")
        assert torch.equal(logits(from_pretrained(saved.parent), LLAMA), expected)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("onto", KINDS[:3])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_an_adapter_takes_over_the_scales_of_what_is_loaded_into_it(kind, onto, low, tmp_path):
    source, target = make(kind), get_peft_model(LLAMA.make(), half(LLAMA, scale="none"))
    if onto != "no scale":
        target = make(onto)
    source.save_pretrained(tmp_path / "source")
    expected, weights = logits(source, LLAMA), [p for p in target.parameters() if p.requires_grad]
    target.load_adapter(tmp_path / "source", "default", is_trainable=True, low_cpu_mem_usage=low)
    assert torch.equal(logits(target, LLAMA), expected)
    if not low:  # an optimizer still holds them
        assert all(a is b for a, b in zip(weights, (p for p in target.parameters() if p.requires_grad), strict=True))
    set_peft_model_state_dict(target, get_peft_model_state_dict(make(onto)))
    set_peft_model_state_dict(target, get_peft_model_state_dict(source))
    assert torch.equal(logits(target, LLAMA), expected)
    target.save_pretrained(tmp_path / "target")
    assert json.loads((tmp_path / "target" / "adapter_config.json").read_text())["fused_by"]["scale"] == SCALES[kind]
    assert torch.equal(logits(from_pretrained(tmp_path / "target"), LLAMA), expected)


@pytest.mark.parametrize("kind", ["calibrated", "uncalibrated"])
def test_a_configuration_that_was_saved_makes_a_new_adapter(kind, tmp_path):
    make(kind).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    expected = logits(get_peft_model(LLAMA.make(), half(LLAMA)), LLAMA)
    fused = get_peft_model(LLAMA.make(), config)
    assert torch.equal(logits(fused, LLAMA), expected)
    assert config.fused_by["calibration"] == "" and config.fused_by["scale"] == "counts"
    fused.add_adapter("second", PeftConfig.from_pretrained(tmp_path))
    fused.set_adapter("second")
    assert torch.equal(logits(fused, LLAMA), expected)
    model = LLAMA.make()
    model.add_adapter(PeftConfig.from_pretrained(tmp_path))
    assert torch.equal(logits(model, LLAMA), expected)
    model = LLAMA.make(num_hidden_layers=1)  # of which the record of its FFNs says nothing
    get_peft_model(model, PeftConfig.from_pretrained(tmp_path))
    batches = [LLAMA.batch(labels=True, seed=seed, size=8) for seed in range(4)]
    model, config = LLAMA.make(), PeftConfig.from_pretrained(tmp_path)
    calibrate(model, config, batches)
    get_peft_model(model, config)
    assert config.fused_by["calibration"] and config.fused_by["scale"] == "ntk"


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def stored_as(folder: Path, tensors: dict[str, Tensor], binary: bool) -> None:
    file = folder / "adapter_model.safetensors"
    if binary:
        file.unlink(missing_ok=True)
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, file, {"format": "pt"})


NAME = "base_model.model.model.layers.1.mlp.down_proj.mlp_fusion_narrow."
REFUSED = {
    "truncated": "is damaged or incomplete",
    "empty": "is damaged or incomplete",
    "missing": rf"lacks the tensor '{NAME}weight' of shape \(32, 32\)",
    "missing FFN": r"lacks the tensor '.*layers.1.mlp.gate_proj.mlp_fusion_narrow.weight' of shape \(32, 32\)",
    "misshapen": rf"holds '{NAME}weight' of shape \(32, 31\), but this model needs \(32, 32\)",
    "misshapen scale": rf"holds '{NAME}scale' of shape \(3,\), but this model needs \(32,\)",
    "unknown": rf"holds '{NAME}bias', which this model has no place for",
    "more FFNs": r"holds '.*layers.7.mlp.down_proj.mlp_fusion_narrow.weight', which this model has no place for",
}


def damage(folder: Path, how: str, binary: bool) -> None:
    tensors = tensors_of(folder)
    if how.startswith("missing"):
        part = NAME + "weight" if how == "missing" else ".layers.1.mlp."
        tensors = {name: tensor for name, tensor in tensors.items() if part not in name}
    elif how == "misshapen":
        tensors[NAME + "weight"] = tensors[NAME + "weight"][:, :-1].contiguous()
    elif how == "misshapen scale":
        tensors[NAME + "scale"] = torch.ones(3)
    elif how == "unknown":
        tensors[NAME + "bias"] = torch.ones(32)
    elif how == "more FFNs":
        tensors[NAME.replace("layers.1", "layers.7") + "weight"] = tensors[NAME + "weight"].clone()
    stored_as(folder, tensors, binary)
    file = folder / ("adapter_model.bin" if binary else "adapter_model.safetensors")
    if how in ("truncated", "empty"):
        file.write_bytes(file.read_bytes()[:-100] if how == "truncated" else b"")


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("how", REFUSED)
def test_an_adapter_that_does_not_fit_is_refused(how, binary, tmp_path, unchanged):
    make("uncalibrated").save_pretrained(tmp_path)
    damage(tmp_path, how, binary)
    for load in (
        PeftModel.from_pretrained,
        PeftMixedModel.from_pretrained,
        lambda model, folder: PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True),
        lambda model, folder: native(folder, model),
    ):
        model = LLAMA.make()
        check = unchanged(model)
        with pytest.raises(ValueError, match=REFUSED[how]):
            load(model, tmp_path)
        check()
    if how not in ("truncated", "empty", "missing FFN"):  # without a record of the FFNs there are only fewer of them
        model = LLAMA.make()
        check = unchanged(model)
        with pytest.raises(ValueError, match="but this model needs" if how == "misshapen" else REFUSED[how]):
            inject_adapter_in_model(FusionConfig(), model, state_dict=tensors_of(tmp_path))
        check()


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("how", [*REFUSED, "other width", "low rank"])
def test_what_does_not_fit_is_not_loaded_into_an_adapter_either(how, binary, tmp_path):
    model, message = make("calibrated"), REFUSED.get(how, "")
    if how in REFUSED:
        make("uncalibrated").save_pretrained(tmp_path)
        damage(tmp_path, how, binary)
    else:
        other = FusionConfig(ratio=0.25) if how == "other width" else half(LLAMA, method="svd")
        get_peft_model(LLAMA.make(), other).save_pretrained(tmp_path, safe_serialization=not binary)
        message = r"of shape \(\d+, \d+\), but this model needs \(\d+, \d+\)|has no place for"
    before = values(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "default")
    if how not in ("truncated", "empty"):
        with pytest.raises(ValueError, match=message):
            set_peft_model_state_dict(model, tensors_of(tmp_path))
    assert before.keys() == values(model).keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in values(model).items())


def test_a_head_of_another_size(tmp_path, unchanged):
    bert = BY_NAME["bert"]
    adapter = get_peft_model(bert.make(), half(bert))
    adapter.save_pretrained(tmp_path)
    model = bert.make(num_labels=5)
    check = unchanged(model)
    with pytest.raises(
        ValueError, match=r"'base_model.model.classifier.weight' of shape \(3, 32\), .* needs \(5, 32\)"
    ):
        PeftModel.from_pretrained(model, tmp_path)
    check()
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        loaded = PeftModel.from_pretrained(model, tmp_path, ignore_mismatched_sizes=True)
    assert logits(loaded, bert).shape[-1] == 5
    tensors = tensors_of(tmp_path)
    del tensors["base_model.model.classifier.bias"]
    stored_as(tmp_path, tensors, binary=False)
    with pytest.raises(ValueError, match="lacks the tensor 'base_model.model.classifier.bias'"):
        adapter.load_adapter(tmp_path, "default")


def test_a_part_of_a_projection_is_refused():
    model = make("calibrated", BY_NAME["llama_bias"])
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("default.bias")}
    with pytest.raises(ValueError, match=r"but not '.*default.bias': a narrow projection is loaded as a whole"):
        model.load_state_dict(state, strict=False)
    model.load_state_dict({name: tensor for name, tensor in state.items() if "narrow" not in name}, strict=False)


def test_tensors_that_never_come_are_an_error(tmp_path, monkeypatch):
    make("uncalibrated").save_pretrained(tmp_path)
    load = LlamaForCausalLM._load_pretrained_model

    def but_one(**kwargs: Any) -> Any:
        result = load(**kwargs)
        kwargs["model"].model.layers[1].mlp.up_proj.mlp_fusion_narrow["default"].weight.data.fill_(torch.nan)
        return result

    monkeypatch.setattr(LlamaForCausalLM, "_load_pretrained_model", staticmethod(but_one))
    with pytest.raises(ValueError, match=r"Nothing was loaded into 'model.layers.1.mlp.up_proj.mlp_fusion_narrow.wei"):
        native(tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Tensor]:
    """A cache of the Hub with an adapter "me/adapter" of two revisions, "main" a damaged one, and its logits."""
    model = make("calibrated")
    root = tmp_path / "cache" / "models--me--adapter"
    for revision, commit in (("main", "a" * 40), ("good", "b" * 40)):
        folder = root / "snapshots" / commit
        model.save_pretrained(folder)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / revision).write_text(commit)
        if revision == "main":
            damage(folder, "truncated", binary=False)
    return {"cache_dir": str(tmp_path / "cache")}, logits(model, LLAMA)


def test_the_file_is_looked_up_as_the_loading_does(hub, unchanged):
    where, expected = hub
    loaded = PeftModel.from_pretrained(LLAMA.make(), "me/adapter", revision="good", **where)
    assert torch.equal(logits(loaded, LLAMA), expected)
    loaded.load_adapter("me/adapter", "default", revision="good", **where)
    own = LLAMA.make()
    own.load_adapter("me/adapter", adapter_kwargs={"revision": "good", **where})
    assert torch.equal(logits(own, LLAMA), expected)
    for load in (
        lambda model: PeftModel.from_pretrained(model, "me/adapter", **where),
        lambda model: model.load_adapter("me/adapter", adapter_kwargs=where),
    ):
        model = LLAMA.make()
        check = unchanged(model)
        with pytest.raises(ValueError, match="aaaa/adapter_model.safetensors is damaged or incomplete"):
            load(model)
        check()


def test_token_and_other_settings_are_passed_on(hub, monkeypatch):
    where, _ = hub
    calls = []

    @wraps(hf_hub_download)
    def download(*args: Any, **kwargs: Any) -> str:
        calls.append((args, kwargs))
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_fusion.tuner.stored.hf_hub_download", download)
    settings = {"revision": "good", "token": "secret", **where}
    with pytest.raises(KeyboardInterrupt):
        PeftModel.from_pretrained(LLAMA.make(), "me/adapter", **settings)
    with pytest.raises(KeyboardInterrupt):
        LLAMA.make().load_adapter("me/adapter", adapter_kwargs=settings)
    for args, kwargs in calls:
        assert args == ("me/adapter", "adapter_model.safetensors")
        assert settings.items() <= kwargs.items()
    assert len(calls) == 2


def test_subfolders_and_folders_without_weights(tmp_path, unchanged):
    model = make("calibrated")
    model.save_pretrained(tmp_path / "sub")
    loaded = PeftModel.from_pretrained(LLAMA.make(), tmp_path, subfolder="sub")
    assert torch.equal(logits(loaded, LLAMA), logits(model, LLAMA))
    if version.parse(transformers.__version__) >= version.parse("5.23"):  # 5.19 looks for weights in the folder itself
        own = native(tmp_path, adapter_kwargs={"subfolder": "sub"}, use_safetensors=None)
        assert torch.equal(logits(own, LLAMA), logits(model, LLAMA))
    (tmp_path / "sub" / "adapter_model.safetensors").unlink()
    fresh = LLAMA.make()
    check = unchanged(fresh)
    with pytest.raises(ValueError, match="adapter_model.safetensors and adapter_model.bin"):
        PeftModel.from_pretrained(fresh, tmp_path, subfolder="sub")
    check()


def test_names_that_have_changed_are_mapped(tmp_path):
    model = make("calibrated")
    model.save_pretrained(tmp_path)
    old = {name.replace(".layers.", ".h."): tensor for name, tensor in tensors_of(tmp_path).items()}
    stored_as(tmp_path, old, binary=False)
    loaded = PeftModel.from_pretrained(LLAMA.make(), tmp_path, key_mapping={r"^model\.h\.": "model.layers."})
    assert torch.equal(logits(loaded, LLAMA), logits(model, LLAMA))
    base = LLAMA.make()
    base._checkpoint_conversion_mapping = {r"^model\.h\.": "model.layers."}
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path), LLAMA), logits(model, LLAMA))
