"""`fidelity` of routed experts: widths, output errors and parameters; kernels of what is dense beside them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import half
from moes import DEEPSEEK, GPT_OSS, LLAMA4, MIXTRAL, NEMOTRON_H, QWEN2
from peft import get_peft_model

from peft_fusion import fidelity
from peft_fusion.ffn import find_experts


def output_error(fused, experts, batch) -> tuple[float, float]:
    """By hand: the narrow experts on the very arguments that the original ones get."""
    seen = []
    with fused.disable_adapter(), torch.no_grad():
        hook = experts.projections[0].register_forward_hook(
            lambda m, args, kwargs, y: seen.append((args, kwargs, y.clone())), with_kwargs=True
        )
        fused(**batch)
        hook.remove()
    (args, kwargs, original), *_ = seen
    with torch.no_grad():
        narrow = experts.projections[0](*args, **kwargs)
    distance, size = ((t.norm(dim=-1).mean()) for t in (narrow - original, original))
    return float(distance), float(distance / size)


@pytest.mark.parametrize("host", [MIXTRAL, QWEN2, DEEPSEEK, GPT_OSS, LLAMA4, NEMOTRON_H], ids=lambda host: host.name)
def test_output_errors_are_those_on_the_originals_inputs(host):
    fused = get_peft_model(host.make(), half(host)).eval()
    batch = host.batch(size=4)
    batch.pop("attention_mask", None)
    report = fidelity(fused, [batch])
    found = {ffn.name: ffn for ffn in report.ffns}
    experts = find_experts(fused.get_base_model())
    assert experts
    for one in experts:
        of_experts = found[one.name]
        assert (of_experts.width, of_experts.narrow_width) == (one.width, one.width // 2)
        expected = output_error(fused, one, batch)
        assert (of_experts.output.absolute, of_experts.output.relative) == pytest.approx(expected, rel=1e-4)
        assert expected[1] > 0.01 and math.isnan(of_experts.ntk.adam.relative) and not of_experts.matrices
    assert report.parameters[1] == sum(p.numel() for p in fused.merge_and_unload().parameters())


def test_kernels_are_those_of_what_is_dense(tmp_path):
    both = get_peft_model(QWEN2.make(), half(QWEN2))
    dense = get_peft_model(QWEN2.make(), half(QWEN2, exclude_modules=["experts"]))
    batch = QWEN2.batch(size=4)
    one, other = fidelity(both, [batch]), fidelity(dense, [batch])
    torch.testing.assert_close(one.kernels["adam"][0], other.kernels["adam"][0])  # of the original
    assert math.isfinite(one.ntk.adam.relative) and len(one.ffns) > len(other.ffns)
    alone = fidelity(get_peft_model(MIXTRAL.make(), half(MIXTRAL)), [MIXTRAL.batch(size=4)])
    assert math.isnan(alone.ntk.adam.relative) and math.isfinite(alone.divergence)
    assert "nan" in str(alone)
    alone.to_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["ffns"][0]["ntk"]["adam"]["relative"] is None
    alone.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000
