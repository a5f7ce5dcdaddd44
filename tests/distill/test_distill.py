"""`distill`: predictions come closer, nothing else moves, whatever ends it, and what cannot be is refused."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace

import numpy
import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME
from helpers import half, logits
from peft import LoraConfig, PeftMixedModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainingArguments

from peft_fusion import FusionConfig, distill, fuse
from peft_fusion.distill import trainer as trainer_module
from peft_fusion.observe.unwrap import unwrapped

LLAMA, BERT = BY_NAME["llama"], BY_NAME["bert"]


def batches(architecture, count: int = 12, labels: bool = True) -> list[dict[str, torch.Tensor]]:
    return [architecture.batch(labels=labels, seed=seed, size=8) for seed in range(count)]


def arguments(folder, **settings) -> TrainingArguments:
    given = {"learning_rate": 3e-3, "per_device_train_batch_size": 8, "report_to": "none", "use_cpu": True}
    return TrainingArguments(output_dir=folder, **{**given, "save_strategy": "no", **settings})


def narrow(architecture=LLAMA, **settings):
    return get_peft_model(architecture.make(), half(architecture, **settings))


def state(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_it_comes_closer_and_nothing_else_moves(architecture, tmp_path):
    model = narrow(architecture).train()
    before, modes = state(model), {name: m.training for name, m in model.named_modules()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state = numpy.random.get_state()[1].copy()
    settings = arguments(tmp_path, eval_strategy="epoch", num_train_epochs=3)
    # a random classifier's predictions hardly depend on its inputs
    outputs = "hidden_states" if architecture.classifies else "logits"
    found = distill(model, batches(architecture), outputs=outputs, args=settings)
    assert found.after < found.before and found.outputs == outputs
    assert found.sequences + found.held_out == 96 and found.held_out == 6
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert moved and all("mlp_fusion_narrow" in name for name in moved)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert (numpy.random.get_state()[1] == numpy_state).all()


def test_the_distances_are_those_of_the_held_out_sequences(tmp_path):
    model = narrow()
    data = [{k: v for k, v in LLAMA.batch(seed=i, size=1).items() if k == "input_ids"} for i in range(16)]
    held_out = data[15]["input_ids"]

    def distance() -> float:
        with torch.no_grad():
            ours = model(held_out).logits.log_softmax(-1)
            with model.disable_adapter():
                theirs = model(held_out).logits.log_softmax(-1)
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    before = distance()
    found = distill(model, data, args=arguments(tmp_path, max_steps=4))
    assert found.held_out == 1 and found.outputs == "logits"
    assert found.before == pytest.approx(before, rel=1e-4)
    assert found.after == pytest.approx(distance(), rel=1e-4)


def test_layers_below_run_once(tmp_path, monkeypatch):
    model = narrow(layers_to_transform=[2])
    calls = []
    for index, layer in enumerate(unwrapped(model).model.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: calls.append(index))
    steps = 0

    def compute(self, *args, original=trainer_module.Distillation.compute_loss, **kwargs):
        nonlocal steps
        before = list(calls)
        loss = original(self, *args, **kwargs)
        assert calls[len(before) :] == [0, 1, 2, 2]
        steps += 1
        return loss

    monkeypatch.setattr(trainer_module.Distillation, "compute_loss", compute)
    distill(model, batches(LLAMA, 2), args=arguments(tmp_path, max_steps=1))
    assert steps == 3


def test_sharing_layers_changes_nothing(tmp_path, monkeypatch):
    module = __import__("importlib").import_module("peft_fusion.distill")
    shared, alone = narrow(layers_to_transform=[2]), narrow(layers_to_transform=[2])
    a = distill(shared, batches(LLAMA), args=arguments(tmp_path, max_steps=5))
    monkeypatch.setattr(module, "_layers_to_share", lambda *_: None)
    b = distill(alone, batches(LLAMA), args=arguments(tmp_path, max_steps=5))
    assert a.after == pytest.approx(b.after, rel=1e-4)
    torch.testing.assert_close(logits(shared, LLAMA), logits(alone, LLAMA))


def test_layers_that_cannot_be_shared_are_not(tmp_path, monkeypatch):
    module = __import__("importlib").import_module("peft_fusion.distill")
    model = narrow(layers_to_transform=[2])
    inner = unwrapped(model).model
    # a model that lets the first layer's output go around all others
    first: list[torch.Tensor] = []
    inner.layers[0].register_forward_hook(lambda m, args, output: first.append(output + 0))
    inner.norm.register_forward_pre_hook(lambda m, args: (args[0] + first.pop(),))
    found = []
    original = module._layers_to_share
    monkeypatch.setattr(module, "_layers_to_share", lambda *given: found.append(original(*given)) or found[-1])
    distill(model, batches(LLAMA, 2), args=arguments(tmp_path, max_steps=1))
    assert found == [None]


@pytest.mark.parametrize("kind", ["batches", "loader", "dataset", "lists", "generator"])
def test_every_kind_of_data(kind, tmp_path):
    rows = [{"input_ids": LLAMA.batch(seed=i, size=1)["input_ids"][0], "labels": torch.ones(7)} for i in range(32)]

    class Indexed(Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return rows[index]

    joined = [{"input_ids": torch.stack([row["input_ids"] for row in rows[i : i + 8]])} for i in range(0, 32, 8)]
    data = {
        "batches": joined,
        "loader": DataLoader(rows, 8),
        "dataset": Indexed(),
        "lists": [{"input_ids": row["input_ids"].tolist(), "text": "a text"} for row in rows],
        "generator": (batch for batch in joined),
    }[kind]
    model, expected = narrow(), narrow()
    found = distill(model, data, args=arguments(tmp_path, max_steps=3))
    assert found.sequences == 30 and found.held_out == 2
    distill(expected, joined, args=arguments(tmp_path, max_steps=3))
    torch.testing.assert_close(logits(model, LLAMA), logits(expected, LLAMA))


def test_padding_has_no_say(tmp_path):
    rows = [LLAMA.batch(seed=i, size=1)["input_ids"][0, : 3 + i % 5] for i in range(32)]
    unpadded = [{"input_ids": row.unsqueeze(0)} for row in rows]
    padded = []
    for row in rows:
        ids, mask = torch.full((1, 9), 5), torch.zeros(1, 9, dtype=torch.int64)
        ids[0, : len(row)], mask[0, : len(row)] = row, 1
        padded.append({"input_ids": ids, "attention_mask": mask})
    a, b = narrow(), narrow()
    one = distill(a, unpadded, args=arguments(tmp_path, max_steps=3))
    other = distill(b, padded, args=arguments(tmp_path, max_steps=3))
    assert one.before == pytest.approx(other.before, rel=1e-5)
    assert one.after == pytest.approx(other.after, rel=1e-4)
    torch.testing.assert_close(logits(a, LLAMA), logits(b, LLAMA), rtol=1e-4, atol=1e-5)


def test_without_data_it_samples_and_keeps_the_text(tmp_path, capsys):
    model, file = narrow(), tmp_path / "own.safetensors"
    before = {path.name for path in tmp_path.iterdir()}
    found = distill(model, tokens=62 * 40, own_text=file)
    assert found.sequences + found.held_out == 39 and found.after <= found.before
    assert {path.name for path in tmp_path.iterdir()} - before == {"own.safetensors"}
    assert "eval_loss" not in capsys.readouterr().out


def test_sampled_sequences_are_as_long_as_asked_for(tmp_path):
    file = tmp_path / "own.safetensors"
    distill(narrow(), tokens=100, length=10, own_text=file, args=arguments(tmp_path, max_steps=1))
    assert load_file(file)["input_ids"].shape == (10, 10)


def test_an_engine_that_parts_weights_is_refused(tmp_path):
    args = arguments(tmp_path)
    args.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3 does not know of"):
        distill(narrow(), batches(LLAMA), args=args)


def test_tokens_bound_the_data(tmp_path):
    found = distill(narrow(), batches(LLAMA), tokens=70, args=arguments(tmp_path, max_steps=1))
    assert found.sequences + found.held_out == 10


@pytest.mark.parametrize("after", [0, 6])
def test_an_interrupt_leaves_the_best_weights(after, tmp_path, unchanged):
    model = narrow()
    weights = state(model)
    check = unchanged(model)

    class Interrupts(TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            if state.global_step > after:
                raise KeyboardInterrupt

    settings = arguments(tmp_path, max_steps=20, eval_strategy="steps", eval_steps=5)
    with pytest.raises(KeyboardInterrupt):
        distill(model, batches(LLAMA), args=settings, callbacks=[Interrupts()])
    if after == 0:
        check()
    else:
        moved = {name for name, value in state(model).items() if not torch.equal(value, weights[name])}
        assert moved and all("mlp_fusion_narrow" in name for name in moved)
        stopped = narrow()
        with pytest.raises(KeyboardInterrupt):
            distill(stopped, batches(LLAMA), args=settings, callbacks=[Interrupts()])
        assert torch.equal(logits(stopped, LLAMA), logits(model, LLAMA))


def test_what_got_worse_is_not_kept(tmp_path, unchanged):
    model = narrow()
    check = unchanged(model)
    found = distill(model, batches(LLAMA), args=arguments(tmp_path, max_steps=4, learning_rate=50.0))
    assert found.after == found.before
    check()


def test_lora_beside_trains_on_request(tmp_path):
    model = get_peft_model(LLAMA.make(), FusionConfig(ratio=0.5), mixed=True)
    assert isinstance(model, PeftMixedModel)
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter(["default", "lora"])
    other = copy.deepcopy(model)
    for which, given in (("narrow", model), ("adapters", other)):
        before = state(given)
        found = distill(given, batches(LLAMA), train=which, args=arguments(tmp_path, max_steps=4))
        moved = {name for name, value in state(given).items() if not torch.equal(value, before[name])}
        assert any("lora_" in name for name in moved) == (which == "adapters")
        assert all("lora_" in name or "mlp_fusion_narrow" in name for name in moved)
        assert found.after < found.before


def test_the_original_is_learnt_from_without_what_trains(tmp_path):
    model = get_peft_model(LLAMA.make(), FusionConfig(ratio=0.5), mixed=True)
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter(["default", "lora"])
    from peft_fusion.distill.predictions import original_shown

    inner = unwrapped(model)
    batch = LLAMA.batch()
    with torch.no_grad(), original_shown(inner):
        shown = inner(**batch).logits
    with torch.no_grad():
        assert torch.equal(shown, LLAMA.make()(**batch).logits)
    for parameter in inner.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad(), original_shown(inner):
        assert not torch.equal(inner(**batch).logits, shown)  # LoRA that does not train belongs to the original


def test_a_teacher_of_its_own(tmp_path):
    kept, plain = narrow(), fuse(LLAMA.make(), FusionConfig(ratio=0.5, scale="none"))
    dropped = narrow(base_weights="discard")
    with pytest.raises(RuntimeError, match="were dropped"):
        distill(dropped, batches(LLAMA), args=arguments(tmp_path, max_steps=2))
    distill(kept, batches(LLAMA), args=arguments(tmp_path, max_steps=4))
    distill(dropped, batches(LLAMA), teacher=LLAMA.make(), args=arguments(tmp_path, max_steps=4))
    torch.testing.assert_close(logits(dropped, LLAMA), logits(kept, LLAMA))
    before, gentle = state(plain), {"max_steps": 4, "learning_rate": 1e-4}
    found = distill(plain, batches(LLAMA), teacher=LLAMA.make(), train="all", args=arguments(tmp_path, **gentle))
    assert found.after < found.before
    assert not any(torch.equal(value, before[name]) for name, value in state(plain).items() if "proj" in name)


def test_a_teacher_in_training_mode_teaches_without_dropout(tmp_path):
    found = []
    for train in (False, True):
        given = BERT.make(hidden_dropout_prob=0.5).train(train)
        flags = {name: parameter.requires_grad for name, parameter in given.named_parameters()}
        settings = {"outputs": "hidden_states", "teacher": given, "args": arguments(tmp_path, max_steps=3)}
        found.append(distill(narrow(BERT), batches(BERT), **settings))
        assert given.training == train
        assert {name: parameter.requires_grad for name, parameter in given.named_parameters()} == flags
    assert found[0] == found[1]


def test_heads_that_are_not_trained_are_passed_over(tmp_path):
    architecture = next(a for a in ARCHITECTURES if a.classifies)
    trained, fresh = narrow(architecture), narrow(architecture)
    for name, parameter in unwrapped(fresh).named_parameters():
        if ("classifier" in name or "score" in name) and name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    data = batches(architecture)
    assert distill(trained, data, args=arguments(tmp_path, max_steps=2)).outputs == "logits"
    assert distill(fresh, data, args=arguments(tmp_path, max_steps=2)).outputs == "hidden_states"
    found = distill(fresh, data, outputs="logits", args=arguments(tmp_path, max_steps=2))
    assert found.outputs == "logits"


def test_trainers_arguments_apply(tmp_path):
    one, accumulated = narrow(), narrow()
    settings = {"max_steps": 3, "max_grad_norm": 0.0, "data_seed": 0}
    distill(one, batches(LLAMA), args=arguments(tmp_path, **settings))
    distill(
        accumulated,
        batches(LLAMA),
        args=arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings),
    )
    torch.testing.assert_close(logits(accumulated, LLAMA), logits(one, LLAMA), rtol=1e-3, atol=1e-4)


def test_it_resumes_from_a_checkpoint(tmp_path):
    whole, stopped = narrow(), narrow()
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    distill(whole, batches(LLAMA), args=arguments(tmp_path / "run", **settings))
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    distill(stopped, batches(LLAMA), args=arguments(tmp_path / "x", resume_from_checkpoint=checkpoint, **settings))
    torch.testing.assert_close(logits(stopped, LLAMA), logits(whole, LLAMA))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": "everything"}, "`train` must be one of narrow, adapters, all"),
        ({"outputs": "loss"}, "`outputs` must be one of auto, logits, hidden_states"),
        ({"tokens": 0}, "`tokens` must be an integer of at least 1"),
        ({"train": "all"}, "would change the original.*Give a `teacher`"),
        ({"length": 0}, "`length` must be an integer of at least 1"),
        ({"data": [], "own_text": "x.safetensors"}, "`own_text` is of what the model samples.*give one of them"),
        ({"data": [], "length": 8}, "`length` is of what the model samples.*give one of them"),
        ({"data": []}, "at least 2 sequences.*got 0"),
        ({"data": [{"input_ids": torch.ones(1, 4).long()}]}, "at least 2 sequences.*got 1"),
        ({"data": ["text"]}, "A batch must be a mapping"),
        ({"data": [{"pixels": torch.ones(8, 4)}]}, "cannot take a batch"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_cannot_be_is_refused(given, message, unchanged):
    model = narrow()
    check = unchanged(model)
    with pytest.raises(ValueError, match=message):
        distill(model, **given)
    check()


def test_without_an_adapter_there_is_nothing_to_learn_from():
    with pytest.raises(ValueError, match="no active fusion adapter"):
        distill(LLAMA.make(), batches(LLAMA))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_is_off_and_checkpointing_is_on(checkpointed, tmp_path):
    model = get_peft_model(BERT.make(hidden_dropout_prob=0.9), half(BERT))
    seen: list[tuple[bool, bool]] = []
    layer = unwrapped(model).bert.encoder.layer[1]
    layer.output.dropout.register_forward_hook(lambda m, *_: seen.append((m.training, torch.is_grad_enabled())))
    settings = {"max_steps": 2, "gradient_checkpointing": checkpointed}
    found = distill(model, batches(BERT), outputs="hidden_states", args=arguments(tmp_path, **settings))
    assert not any(training for training, _ in seen)
    assert sum(graph for _, graph in seen) == (4 if checkpointed else 2)  # in the backward pass once more
    assert not unwrapped(model).is_gradient_checkpointing
    assert found.after < found.before
