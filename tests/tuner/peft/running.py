"""What PEFT and transformers promise about running, training and loading, one behaviour a function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from accelerate import dispatch_model
from adapters import MERGED, narrow_weights
from architectures import Architecture
from helpers import half, logits, relative, train
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from peft_fusion import FusionConfig
from peft_fusion.tuner.layer import FusionLayer

CAUSAL, SEQ_2_SEQ = "CAUSAL_LM", "SEQ_2_SEQ_LM"
HALF_PRECISION = [(dtype, autocast) for dtype in (torch.bfloat16, torch.float16) for autocast in (True, False)]


def no_task(architecture: Architecture, **kwargs) -> FusionConfig:
    """A configuration without task type, which leaves a classifier alone."""
    return FusionConfig(ratio=0.5, **kwargs)


def generating(architecture: Architecture, folder: Path) -> None:
    if architecture.task_type not in (CAUSAL, SEQ_2_SEQ):
        pytest.skip("a classifier generates nothing")
    model = get_peft_model(architecture.make(), half(architecture))
    prompt = {k: v for k, v in architecture.batch().items() if k in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached, uncached = (model.generate(**prompt, **settings, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, uncached)
    beams = model.generate(**prompt, **settings, num_beams=3)
    model.merge_adapter()
    assert torch.equal(model.generate(**prompt, **settings), cached)
    assert torch.equal(model.generate(**prompt, **settings, num_beams=3), beams)


def input_embeddings(architecture: Architecture, folder: Path) -> None:
    base = architecture.make()
    # T5's stacks hold the shared embedding under a name of their own
    embedding = base.encoder.embed_tokens if architecture.task_type == SEQ_2_SEQ else base.get_input_embeddings()
    name = next(name for name, module in base.named_modules() if module is embedding).split(".")[-1]
    model = get_peft_model(base, half(architecture, modules_to_save=[name]))
    weights = [p for n, p in model.named_parameters() if f"{name}.modules_to_save" in n]
    assert weights and all(p.requires_grad for p in weights)
    before = [p.detach().clone() for p in weights]
    train(model, architecture)
    assert not any(torch.equal(p, old) for p, old in zip(weights, before, strict=True))
    expected = logits(model, architecture)
    model.save_pretrained(folder)
    assert torch.equal(logits(PeftModel.from_pretrained(architecture.make(), folder), architecture), expected)
    batch = architecture.batch()
    embedded = model.get_input_embeddings()(batch.pop("input_ids"))
    if architecture.task_type != SEQ_2_SEQ:
        with torch.no_grad():
            torch.testing.assert_close(model(inputs_embeds=embedded, **batch).logits, expected)


def dispatching(architecture: Architecture, folder: Path) -> None:
    architecture.make().save_pretrained(folder / "base")
    base = type(architecture.make()).from_pretrained(folder / "base", device_map="cpu").eval()
    model = get_peft_model(base, half(architecture))
    expected = logits(get_peft_model(architecture.make(), half(architecture)), architecture)
    if architecture.task_type != "SEQ_CLS":
        assert torch.equal(logits(model, architecture), expected)
    model.save_pretrained(folder / "adapter")
    hooked = dispatch_model(architecture.make(), {"": "cpu"}, force_hooks=True)
    loaded = PeftModel.from_pretrained(hooked, folder / "adapter")
    assert torch.equal(logits(loaded, architecture), logits(model, architecture))
    merged = loaded.merge_and_unload()
    assert relative(logits(merged, architecture), logits(model, architecture)) < MERGED


def half_precision(architecture: Architecture, folder: Path) -> None:
    for dtype, autocast in HALF_PRECISION:
        config = no_task(architecture)  # PEFT leaves a trained classifier in fp16, where AdamW overflows
        model = get_peft_model(architecture.make().to(dtype), config, autocast_adapter_dtype=autocast)
        expected = torch.float32 if autocast else dtype
        assert {p.dtype for p in narrow_weights(model, "default")} == {expected}
        before = logits(model, architecture)
        assert before.dtype == dtype and torch.isfinite(before).all()
        if dtype == torch.bfloat16 or autocast:  # neither can narrow weights in fp16
            train(model, architecture)
        trained = logits(model, architecture)
        assert torch.isfinite(trained).all()
        model.save_pretrained(folder / f"{dtype}{autocast}")
        loaded = PeftModel.from_pretrained(
            architecture.make().to(dtype), folder / f"{dtype}{autocast}", autocast_adapter_dtype=autocast
        )
        assert torch.equal(logits(loaded, architecture), trained)
        merged = model.merge_and_unload()
        assert {p.dtype for p in merged.parameters() if p.dim() == 2} == {dtype}
        assert relative(logits(merged, architecture).float(), trained.float()) < 0.05


def gradients(model: nn.Module, architecture: Architecture) -> list[torch.Tensor]:
    model.train()
    torch.manual_seed(0)
    model(**architecture.batch(labels=True)).loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


def gradient_checkpointing(architecture: Architecture, folder: Path) -> None:
    model = get_peft_model(architecture.make(), half(architecture))
    expected = gradients(model, architecture)
    assert all(float(grad.abs().sum()) > 0 for grad in expected if grad.dim() == 2)
    for use_reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        for found, grad in zip(gradients(model, architecture), expected, strict=True):
            torch.testing.assert_close(found, grad)


def compiling(architecture: Architecture, folder: Path) -> None:
    model = get_peft_model(architecture.make(), half(architecture, base_weights="offload"))
    expected = logits(model, architecture)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**architecture.batch()).logits, expected)
    torch._dynamo.reset()


def transformers_own_adapters(architecture: Architecture, folder: Path) -> None:
    model = architecture.make()
    original = logits(model, architecture)
    model.add_adapter(no_task(architecture), "first")
    model.add_adapter(FusionConfig(ratio=0.25), "second")
    assert model.active_adapters() == ["second"]
    second = logits(model, architecture)
    model.set_adapter("first")
    first = logits(model, architecture)
    assert not torch.allclose(first, second)
    model.disable_adapters()
    assert torch.equal(logits(model, architecture), original)
    model.enable_adapters()
    assert torch.equal(logits(model, architecture), first)
    with pytest.raises(ValueError, match="cannot be active or merged together"):
        model.set_adapter(["first", "second"])
    assert torch.equal(logits(model, architecture), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model, architecture), first)
    train(model, architecture)
    first = logits(model, architecture)
    model.save_pretrained(folder)
    for low in (False, True):
        other = architecture.make()
        other.load_adapter(str(folder), "loaded", low_cpu_mem_usage=low)
        assert torch.equal(logits(other, architecture), first)
    assert torch.equal(logits(PeftModel.from_pretrained(architecture.make(), folder), architecture), first)
    model.delete_adapter("first")
    assert torch.equal(logits(model, architecture), original)


def auto_model_of_an_adapter(architecture: Architecture, folder: Path) -> None:
    architecture.make().save_pretrained(folder / "base")
    base = type(architecture.make()).from_pretrained(folder / "base").eval()
    model = get_peft_model(base, half(architecture))
    train(model, architecture)
    expected = logits(model, architecture)
    model.save_pretrained(folder / "adapter")
    auto = {
        CAUSAL: tf.AutoModelForCausalLM,
        SEQ_2_SEQ: tf.AutoModelForSeq2SeqLM,
        "SEQ_CLS": tf.AutoModelForSequenceClassification,
    }[architecture.task_type]
    loaded = auto.from_pretrained(folder / "adapter")
    assert any(isinstance(module, FusionLayer) for module in loaded.modules())
    assert torch.equal(logits(loaded, architecture), expected)


def a_refused_adapter_can_be_corrected(architecture: Architecture, folder: Path) -> None:
    model = architecture.make()
    for name, config in (("a", FusionConfig(target_modules=["nosuch"])), ("a.b", no_task(architecture))):
        with pytest.raises(ValueError, match="nosuch|cannot be named 'a.b'"):
            model.add_adapter(config, name)
    model.add_adapter(no_task(architecture), "a")
    expected = logits(inject_adapter_in_model(no_task(architecture), architecture.make()), architecture)
    assert torch.equal(logits(model, architecture), expected)


RUNNING = [
    generating,
    input_embeddings,
    gradient_checkpointing,
    transformers_own_adapters,
    auto_model_of_an_adapter,
    a_refused_adapter_can_be_corrected,
]
LONG = [dispatching, half_precision, compiling]
