"""Quantised base models: their FFNs are dequantised for fusing, the rest stays as it is; or a refusal by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from adapters import MERGED, narrow_weights
from architectures import BY_NAME
from helpers import half, logits, relative, train
from peft import PeftModel, get_peft_model
from torch import nn

from peft_fusion import FusionConfig
from peft_fusion.ffn import find_ffns
from peft_fusion.ffn.storage import dense_parameter, is_quantised

LLAMA = BY_NAME["llama"]
SIZES = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "num_key_value_heads": 4}  # fit 4-bit blocks
WITHIN = 0.02  # relative error of a forward pass in half precision


def bitsandbytes(**bits: bool) -> tf.BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return tf.BitsAndBytesConfig(**bits)


def torchao() -> tf.TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    return tf.TorchAoConfig(quantization.Int8WeightOnlyConfig())


QUANTISERS: dict[str, Callable[[], object]] = {
    "bitsandbytes 8-bit": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes 4-bit": lambda: bitsandbytes(load_in_4bit=True),
    "torchao int8": torchao,
}


def load(folder: Path, config: object) -> nn.Module:
    return tf.LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()


@pytest.fixture(params=QUANTISERS)
def quantised(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], nn.Module]:
    """Makes the same quantised model any number of times."""
    config = QUANTISERS[request.param]()
    LLAMA.make(**SIZES).save_pretrained(tmp_path / "base")

    def make() -> nn.Module:
        model = load(tmp_path / "base", config)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # a packing that bitsandbytes 0.50 undoes wrongly
        return model

    return make


def dequantised(model: nn.Module) -> nn.Module:
    """A plain model that computes with the numbers that a quantised one stores."""
    plain = LLAMA.make(**SIZES)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            plain.get_submodule(name).weight.data.copy_(dense_parameter(module, "weight"))
    return plain


def test_ffns_are_fused_as_if_they_were_plain(quantised):
    expected = get_peft_model(dequantised(quantised()), half(LLAMA))
    for forward_before in (False, True):
        model = quantised()
        if forward_before:
            logits(model, LLAMA)
        fused = get_peft_model(model, half(LLAMA))
        for found, weight in zip(narrow_weights(fused, "default"), narrow_weights(expected, "default"), strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, weight)
        assert relative(logits(fused, LLAMA), logits(expected, LLAMA)) < WITHIN


def test_weights_packed_for_the_cpu_are_refused(tmp_path):
    config = bitsandbytes(load_in_4bit=True)
    LLAMA.make(**SIZES).save_pretrained(tmp_path)
    model = load(tmp_path, config)
    if not model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no such packing")
    logits(model, LLAMA)
    with pytest.raises(ValueError, match="Linear4bit was packed for the CPU .* Load the model anew"):
        get_peft_model(model, half(LLAMA))
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("base_weights", ["keep", "discard"])
def test_training_saving_merging(quantised, base_weights, tmp_path):
    model = quantised()
    original = logits(model, LLAMA)
    fused = get_peft_model(model, half(LLAMA, base_weights=base_weights))
    before = [p.detach().clone() for p in narrow_weights(fused, "default")]
    train(fused, LLAMA)
    assert not any(torch.equal(p, old) for p, old in zip(narrow_weights(fused, "default"), before, strict=True))
    expected = logits(fused, LLAMA)
    fused.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(quantised(), tmp_path / "adapter"), LLAMA), expected)
    if base_weights == "keep":
        with fused.disable_adapter():
            assert torch.equal(logits(fused, LLAMA), original)
    fused.merge_adapter()
    assert relative(logits(fused, LLAMA), expected) < MERGED
    fused.unmerge_adapter()
    assert torch.equal(logits(fused, LLAMA), expected)
    merged = fused.merge_and_unload()
    assert relative(logits(merged, LLAMA), expected) < MERGED
    attention = merged.model.layers[0].self_attn.q_proj
    assert is_quantised(attention)  # the rest stays quantised
    assert {type(p) for ffn in find_ffns(merged) for p in ffn.projections} == {nn.Linear}
    assert not any(is_quantised(p) for ffn in find_ffns(merged) for p in ffn.projections)


def test_offloading_is_refused(quantised):
    model = quantised()
    with pytest.raises(ValueError, match="cannot move `model.layers.0.mlp.gate_proj` .* is quantised. Choose"):
        get_peft_model(model, half(LLAMA, base_weights="offload"))
    assert not hasattr(model, "peft_config")


class PackedLinear(nn.Linear):
    """A linear module of a method that nobody has heard of."""

    def pack(self, dtype: torch.dtype) -> PackedLinear:
        self.weight = nn.Parameter(self.weight.detach().to(dtype), requires_grad=False)
        return self


class QuantLinear(nn.Module):
    """As GPTQ's and AWQ's: no `nn.Linear`, and no weight."""


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_packed_weights_of_an_unknown_method_are_refused_by_name(dtype):
    model = LLAMA.make()
    model.model.layers[1].mlp.up_proj = PackedLinear(32, 64, bias=False).pack(dtype)
    modules = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight` \(PackedLinear.*bitsandbytes or torchao"):
        get_peft_model(model, FusionConfig())
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert not hasattr(model, "peft_config")


def test_modules_without_weights_are_refused_by_name(unchanged):
    model = LLAMA.make()
    for layer in model.model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj = QuantLinear(), QuantLinear(), QuantLinear()
    check = unchanged(model)
    with pytest.raises(ValueError, match="projections are of the class QuantLinear, which cannot be read"):
        get_peft_model(model, FusionConfig())
    check()


@pytest.mark.slow
@pytest.mark.real
def test_gguf_file_is_fused_and_merged(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "examples"))
    from common.errors import InputError
    from common.load_models import load_causal_lm

    try:
        model, _ = load_causal_lm(None)
    except InputError as error:
        pytest.skip(str(error))
    batch = LLAMA.batch(size=1)
    fused = get_peft_model(model, FusionConfig(ratio=0.25, layers_to_transform=[3], max_iter=1, n_init=1)).eval()
    with torch.no_grad():
        expected = fused(**batch).logits
        with pytest.warns(UserWarning, match="different widths"):
            merged = fused.merge_and_unload()
        assert relative(merged(**batch).logits, expected) < 1e-4
