"""`allocation="fisher"`: the budget holds, neurons go where they count, and widths can be had again by name."""

from __future__ import annotations

import importlib

import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME
from helpers import logits
from peft import PeftModel, get_peft_model
from test_collect import batches

from peft_fusion import FusionConfig, calibrate
from peft_fusion.observe.networks import fusion_layers
from peft_fusion.tuner.handover import handed_over

LLAMA = BY_NAME["llama"]


def budget(**settings) -> FusionConfig:
    return FusionConfig(**{"ratio": 0.5, "allocation": "fisher", "multiple_of": 4, **settings})


def uneven():
    """A Llama of whose FFNs the first hardly counts, and the last counts most."""
    model = LLAMA.make()
    with torch.no_grad():
        for layer, size in zip(model.model.layers, (0.05, 1.0, 4.0), strict=True):
            layer.mlp.down_proj.weight.mul_(size)
    return model


def fused(model, config, **given):
    calibrate(model, config, batches(LLAMA), **given)
    return get_peft_model(model, config)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_it_holds_for_every_architecture(architecture):
    model, config = architecture.make(), budget(task_type=architecture.task_type)
    calibrate(model, config, batches(architecture))
    adapted = get_peft_model(model, config)
    widths = {name: narrow for name, (_, narrow) in config.fused_widths.items()}
    whole = architecture.ffns - len(widths)
    used = sum(widths.values()) + whole * architecture.width
    assert 0.85 * 0.5 <= used / (architecture.ffns * architecture.width) <= 0.5
    assert all(width % 4 == 0 for width in widths.values())
    assert logits(adapted, architecture).isfinite().all()


def test_neurons_go_where_they_count():
    config = budget()
    fused(uneven(), config)
    widths = {name.split(".")[2]: narrow for name, (_, narrow) in config.fused_widths.items()}
    assert widths["0"] < 32 < widths.get("2", 64)


def test_neurons_go_where_errors_count_for_more_in_company(monkeypatch):
    """The curves are those of three equal FFNs; what is measured with all narrow ones in place is not."""
    alike, apart = budget(), budget()
    fused(LLAMA.make(), alike)
    seen = {}

    def measured(network, narrow, sequences):
        seen.update(narrow=narrow, sequences=sequences)
        return 1.0, {name: 8.0 if "layers.1" in name else 1.0 for name in narrow}

    narrowing = importlib.import_module("peft_fusion.calibrate.narrowing")
    monkeypatch.setattr(narrowing, "contributions", measured)
    fused(LLAMA.make(), apart)
    assert [narrow.weights.width for narrow in seen["narrow"].values()] == [32, 32, 32] and len(seen["sequences"]) == 3
    one, other = (config.fused_widths.get("model.layers.1.mlp", [64, 64])[1] for config in (alike, apart))
    assert other > one + 4


def test_what_is_left_whole_is_left_alone():
    model, config = uneven(), budget(ratio=0.8)
    before = {name: id(module) for name, module in model.named_modules()}
    adapted = fused(model, config)
    whole = {"model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp"} - config.fused_widths.keys()
    assert whole
    inner = adapted.get_base_model()
    for name in whole:
        assert all(id(m) == before[n] for n, m in inner.named_modules() if n.startswith(name))
    assert len(fusion_layers(inner)) == 3 * len(config.fused_widths)
    trains = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert not any(f"{name}." in parameter for name in whole for parameter in trains)


def test_widths_can_be_had_again_by_name():
    config = budget()
    expected = logits(fused(uneven(), config), LLAMA)
    pattern = {name: narrow for name, (_, narrow) in config.fused_widths.items()}
    again = FusionConfig(width_pattern=pattern, target_modules=list(pattern))
    assert torch.equal(logits(fused(uneven(), again), LLAMA), expected)


def test_groups_allocate_the_same():
    one, three = budget(), budget()
    a, b = fused(uneven(), one), fused(uneven(), three, ffns_per_pass=1)
    assert one.fused_widths == three.fused_widths
    assert torch.equal(logits(a, LLAMA), logits(b, LLAMA))


def test_a_width_of_ones_own_is_kept():
    config = budget(width_pattern={"layers.2.mlp": 8})
    fused(uneven(), config)
    assert config.fused_widths["model.layers.2.mlp"] == [64, 8]
    assert sum(narrow for _, narrow in config.fused_widths.values()) <= 8 + 64


def test_pruning_gets_the_same_widths():
    ours, theirs = budget(), budget(method="pruning")
    fused(uneven(), ours), fused(uneven(), theirs)
    assert ours.fused_widths == theirs.fused_widths
    assert theirs.fused_by["kernel"] == "outputs"


def test_saved_and_loaded(tmp_path):
    adapted = fused(uneven(), budget())
    expected = logits(adapted, LLAMA)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(uneven(), tmp_path)
    assert torch.equal(logits(loaded, LLAMA), expected)


def test_renewed_in_place_the_widths_stay():
    config = budget()
    adapted = fused(uneven(), config)
    widths = dict(config.fused_widths)
    calibrate(adapted, dataloader=batches(LLAMA))
    assert adapted.peft_config["default"].fused_widths == widths


def test_without_a_calibration_it_is_refused(unchanged):
    model = LLAMA.make()
    check = unchanged(model)
    with pytest.raises(ValueError, match=r'`allocation="fisher"` decides widths.*call `calibrate'):
        get_peft_model(model, budget())
    check()
    calibrate(model, FusionConfig(ratio=0.5), batches(LLAMA))
    with pytest.raises(ValueError, match="call `calibrate"):
        get_peft_model(model, budget())


def test_another_budget_is_refused():
    model = LLAMA.make()
    calibrate(model, budget(), batches(LLAMA))
    with pytest.raises(ValueError, match=r"calibrated for another budget.*32, 32.*16, 16"):
        get_peft_model(model, budget(ratio=0.25))
    with pytest.raises(ValueError, match="Call `calibrate` with the configuration"):
        get_peft_model(model, FusionConfig(ratio=0.5, multiple_of=4))
    get_peft_model(model, budget())


def test_what_cannot_be_had_together_is_refused():
    with pytest.raises(ValueError, match=r"`intermediate_size=16` is one width for all"):
        budget(intermediate_size=16)
    with pytest.raises(ValueError, match="`allocation` must be one of uniform, fisher"):
        FusionConfig(allocation="optimal")
    with pytest.raises(ValueError, match="cannot be calibrated"):
        calibrate(LLAMA.make(), budget(method="svd"), batches(LLAMA))


def test_a_model_without_gradients_has_no_budget(unchanged, monkeypatch):
    model = LLAMA.make()
    check = unchanged(model)
    monkeypatch.setattr(model.lm_head, "forward", lambda x: torch.zeros(*x.shape[:-1], 99))
    check_forward = model.lm_head.forward
    with pytest.raises(ValueError, match=r'`allocation="fisher"` needs gradients.*`width_pattern`'):
        calibrate(model, budget(), batches(LLAMA))
    assert model.lm_head.forward is check_forward
    monkeypatch.undo()
    check()
    assert handed_over(model) is None
