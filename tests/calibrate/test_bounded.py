"""How many FFNs a bound on memory lets in a group."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from allocated import Memory
from architectures import BY_NAME

from peft_fusion import FusionConfig, calibrate
from peft_fusion.calibrate.memory import bound, held, making, most_at_once
from peft_fusion.ffn import find_ffns
from peft_fusion.fusing.scales import fitted_scales, rescaled

LLAMA = BY_NAME["llama"]


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    return [LLAMA.batch(seed=seed, size=4) for seed in range(count)]


def wide(**changes: int):
    return LLAMA.make(intermediate_size=768, **changes)


def test_the_largest_group_within_the_bound():
    ffns = find_ffns(wide())
    assert [most_at_once(ffns, bound(ffns, size)) for size in (1, 2, 3)] == [1, 2, 3]
    assert most_at_once(ffns, bound(ffns, 2) - 1) == 1 and most_at_once(ffns, 10**12) == 3
    assert bound(ffns, 2) - bound(ffns, 1) == held(ffns[0])


def test_half_precision_takes_less():
    full, half = find_ffns(wide())[0], find_ffns(wide().bfloat16())[0]
    assert held(half) < held(full) and making(half) == making(full)


@pytest.mark.parametrize("size", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_calibration_keeps_within_it(size, monkeypatch):
    monkeypatch.setattr("peft_fusion.fusing.cluster.ward._tile", lambda gram: 32)  # made for larger matrices
    monkeypatch.setattr("peft_fusion.fusing.cluster.gram.ROW_TILE", 64)
    model, config = wide(), FusionConfig(ratio=0.25)
    allowed = bound(find_ffns(model), size)
    with Memory() as memory:
        calibrate(model, config, batches(), memory=allowed)
    narrow = 3 * 4 * 3 * 32 * 768 // 4
    assert 0.5 * allowed < memory.peak < allowed + 2 * narrow


def test_what_does_not_suffice_is_refused_before_any_work(unchanged):
    model = wide()
    check = unchanged(model)
    with pytest.raises(ValueError, match=f"which takes {bound(find_ffns(model), 1):,}"):
        calibrate(model, FusionConfig(ratio=0.5), batches(), memory=1000)
    with pytest.raises(ValueError, match="give one"):
        calibrate(model, FusionConfig(ratio=0.5), batches(), memory=10**9, ffns_per_pass=1)
    check()


def test_fitting_scales_holds_no_second_set_of_narrow_weights(monkeypatch):
    held_then: list[int] = []

    def watched(function):
        def run(*args):
            held_then.append(memory.total)
            return function(*args)

        return run

    for function in (fitted_scales, rescaled):
        monkeypatch.setattr(import_module("peft_fusion.calibrate.scales"), function.__name__, watched(function))
    with Memory() as memory:
        calibrate(LLAMA.make(intermediate_size=256, num_hidden_layers=4), FusionConfig(ratio=0.5), batches(2))
    one = 4 * 3 * 32 * 256 // 2
    assert len(held_then) == 8 and max(held_then) - min(held_then) < one, (held_then, one)
