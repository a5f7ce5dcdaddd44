"""`tune_layers`: the error falls, nothing but the fused weights moves, and what cannot be tuned is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME
from helpers import half, logits
from peft import get_peft_model

from peft_fusion import FusionConfig, fuse
from peft_fusion.observe.pair import pair
from peft_fusion.tune import ffn_outputs, tune_layers
from peft_fusion.tune.ffn_outputs import METRIC_SEQUENCES
from peft_fusion.tune.hidden_states import _hidden_states, hidden_state_error


def batches(architecture, count: int = 8) -> list[dict[str, torch.Tensor]]:
    return [architecture.batch(labels=True, seed=seed, size=8) for seed in range(count)]


def settings(objective: str) -> dict:
    return {"steps": 30, "learning_rate": 0.02} if objective == "ffn" else {"learning_rate": 3e-3}


@pytest.mark.common
@pytest.mark.parametrize("objective", ["ffn", "hidden_states"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_error_falls_and_only_fused_weights_move(architecture, objective):
    fused = get_peft_model(architecture.make(), FusionConfig(ratio=0.5, task_type=architecture.task_type))
    before = {name: p.detach().clone() for name, p in fused.named_parameters()}
    trainable = {name: p.requires_grad for name, p in fused.named_parameters()}
    errors = tune_layers(fused, batches(architecture) * 3, objective=objective, **settings(objective))
    assert len(errors) == (architecture.ffns if objective == "ffn" else 1)
    for first, last in errors.values():
        assert last < first
    for name, parameter in fused.named_parameters():
        if "mlp_fusion_narrow" not in name:
            assert torch.equal(parameter, before[name]), name
    assert any(not torch.equal(p, before[name]) for name, p in fused.named_parameters())
    assert {name: p.requires_grad for name, p in fused.named_parameters()} == trainable
    assert all(p.grad is None for p in fused.parameters())


@pytest.mark.parametrize("objective", ["ffn", "hidden_states"])
def test_a_given_teacher_equals_the_disabled_adapter(objective):
    llama = BY_NAME["llama"]
    kept = get_peft_model(llama.make(), FusionConfig(ratio=0.5))
    dropped = get_peft_model(llama.make(), FusionConfig(ratio=0.5, base_weights="discard"))
    tune_layers(kept, batches(llama), objective=objective, **settings(objective))
    with pytest.raises(RuntimeError, match="were dropped"):
        tune_layers(dropped, batches(llama), objective=objective)
    tune_layers(dropped, batches(llama), objective=objective, teacher=llama.make(), **settings(objective))
    torch.testing.assert_close(logits(dropped, llama), logits(kept, llama))


def test_what_is_no_tensor_in_a_batch_is_passed_on():
    llama = BY_NAME["llama"]
    fused = get_peft_model(llama.make(), FusionConfig(ratio=0.5))
    batch = {"output_attentions": False, **llama.batch(size=8)}
    warnings.simplefilter("error", UserWarning)  # nor does it stand in the way of gradients
    assert all(last < first for first, last in tune_layers(fused, [batch] * 4, **settings("ffn")).values())


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_without_data_a_model_learns_on_inputs_of_its_own(architecture):
    results = []
    for _ in range(2):
        torch.manual_seed(len(results))  # the global random state does not matter, and stays as it is
        state, fused = torch.get_rng_state(), get_peft_model(architecture.make(), FusionConfig(ratio=0.5))
        torch.set_rng_state(state)
        errors = tune_layers(fused, tokens=600, steps=20)
        assert torch.equal(torch.get_rng_state(), state)
        assert errors and all(last <= first for first, last in errors.values())
        assert sum(last for _, last in errors.values()) < sum(first for first, _ in errors.values())
        results.append(errors)
    assert results[0] == results[1]


def test_errors_are_measured_in_the_fisher_metric(monkeypatch):
    """Where predictions depend on the first output alone, that one is learned, better than in the plain norm."""
    llama, errors = BY_NAME["llama"], []
    for metric in (torch.diag(torch.eye(32)[0]), torch.eye(32)):
        monkeypatch.setattr(
            "peft_fusion.tune.ffn_outputs.fisher_information",
            lambda side, *_, metric=metric: {ffn.name: metric for ffn in side.ffns},
        )
        fused = get_peft_model(llama.make(), FusionConfig(ratio=0.5))
        tune_layers(fused, batches(llama) * 3, **settings("ffn"))
        x = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            y = llama.make().model.layers[0].mlp(x)
            found = fused.get_submodule("base_model.model.model.layers.0.mlp")(x)
        errors.append(float((found - y)[:, 0].square().mean()))
    assert errors[0] < errors[1]


def test_the_metric_is_of_enough_sequences_and_no_more(monkeypatch):
    taken = []
    monkeypatch.setattr(
        "peft_fusion.tune.ffn_outputs.fisher_information", lambda n, found, seed: taken.append(len(found)) or {}
    )
    llama = BY_NAME["llama"]
    fused = get_peft_model(llama.make(), FusionConfig(ratio=0.5))
    tune_layers(fused, batches(llama) * 100, steps=2)
    assert taken == [METRIC_SEQUENCES]


def test_a_hopeless_learning_rate_changes_nothing():
    llama = BY_NAME["llama"]
    fused = get_peft_model(llama.make(), FusionConfig(ratio=0.5))
    before = logits(fused, llama)
    errors = tune_layers(fused, batches(llama), learning_rate=100.0, steps=5)
    assert all(first == last for first, last in errors.values())
    assert torch.equal(logits(fused, llama), before)


def test_padding_does_not_count_in_the_hidden_state_error():
    bert = BY_NAME["bert"]
    fused = get_peft_model(bert.make(), FusionConfig(ratio=0.5))
    original, narrow = pair(fused, None)
    batch = bert.batch()
    batch["attention_mask"][:, 4:] = 0
    with torch.no_grad():
        with original.running():
            expected = _hidden_states(original(batch, hidden_states=True))
        with narrow.running():
            found = _hidden_states(narrow(batch, hidden_states=True))
    error = hidden_state_error(found, expected, batch)
    naive = torch.stack([(f[:, :4] - e[:, :4]).square().mean() for (f, _), (e, _) in zip(found, expected, strict=True)])
    torch.testing.assert_close(error, naive.mean())
    assert error > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "logits"}, "`objective` must be one of ffn, hidden_states, but got 'logits'"),
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0"),
        ({"steps": -1}, "`steps` must be above 0"),
        ({"tokens": 0}, "`tokens` must be above 0"),
        ({"dataloader": None, "objective": "hidden_states"}, 'needs a `dataloader`; only "ffn" does without'),
        ({"dataloader": []}, "yields no batch"),
        ({"dataloader": [], "objective": "hidden_states"}, "yields no batch"),
        ({"dataloader": [{"pixels": torch.ones(2, 3)}]}, "cannot take a batch"),
    ],
)
def test_refused(change, message):
    bert = BY_NAME["bert"]
    fused = get_peft_model(bert.make(), FusionConfig(ratio=0.5))
    before = logits(fused, bert)
    with pytest.raises(ValueError, match=message):
        tune_layers(fused, **({"dataloader": batches(bert)} | change))
    assert torch.equal(logits(fused, bert), before)


def test_a_model_without_an_adapter_is_refused():
    bert = BY_NAME["bert"]
    with pytest.raises(ValueError, match="no active fusion adapter"):
        tune_layers(bert.make(), batches(bert))
    narrow = fuse(bert.make(), FusionConfig(ratio=0.5))
    with pytest.raises(ValueError, match="no active fusion adapter|no fused weights"):
        tune_layers(narrow, batches(bert), teacher=bert.make(), objective="hidden_states")


def test_an_accelerator_gives_its_precision_and_its_mean_of_gradients():
    class Halving:
        """Stands for an accelerator of mixed precision."""

        reduced = 0

        def autocast(self):
            return torch.autocast("cpu", torch.bfloat16)

        def reduce(self, gradient, reduction):
            assert reduction == "mean"
            self.reduced += 1
            return gradient

    bert, dtypes = BY_NAME["bert"], set()
    fused = get_peft_model(bert.make(), FusionConfig(ratio=0.5, task_type="SEQ_CLS"))
    handle = fused.get_submodule("base_model.model.bert.encoder.layer.0.output.dense").register_forward_hook(
        lambda module, args, output: dtypes.add(output.dtype)
    )
    accelerator = Halving()
    before, after = tune_layers(
        fused, batches(bert) * 3, objective="hidden_states", learning_rate=3e-3, accelerator=accelerator
    )["hidden_states"]
    handle.remove()
    assert dtypes == {torch.bfloat16} and accelerator.reduced == 24 * bert.ffns * 4 and after < before
    assert all(p.dtype == torch.float32 for p in fused.parameters())


@pytest.mark.parametrize("objective", ["ffn", "hidden_states"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moment", [3, 400, 700])
def test_an_interrupt_leaves_the_model_as_it_was(objective, dtype, moment, monkeypatch):
    """Weights, dtypes, gradients, what trains, modes, hooks."""
    llama = BY_NAME["llama"]
    fused = get_peft_model(llama.make().to(dtype), half(llama), autocast_adapter_dtype=False).train()
    fused(**llama.batch(labels=True)).loss.backward()
    state = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    parameters = {name: (p.dtype, p.requires_grad, p.grad) for name, p in fused.named_parameters()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in fused.named_parameters()}
    calls, real = iter(range(10**9)), torch.nn.functional.linear

    def interrupted(*args):
        if next(calls) == moment:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr("torch.nn.functional.linear", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune_layers(fused, batches(llama) * 40, objective=objective, steps=30, tokens=64)
    monkeypatch.undo()
    assert all(torch.equal(tensor, state[name]) for name, tensor in fused.state_dict().items())
    for name, parameter in fused.named_parameters():
        dtype_before, trains, gradient = parameters[name]
        assert (parameter.dtype, parameter.requires_grad) == (dtype_before, trains)
        assert parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, gradients[name])
    assert all(module.training for module in fused.modules())
    if objective == "ffn":  # transformers keeps hooks of its own once it was asked for hidden states
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in fused.modules())


@pytest.mark.parametrize("objective", ["ffn", "hidden_states"])
def test_frozen_weights_stay_frozen_and_gradients_stay(objective):
    llama = BY_NAME["llama"]
    fused = get_peft_model(llama.make(), half(llama))
    fused(**llama.batch(labels=True)).loss.backward()
    fused.requires_grad_(False)
    gradients = {name: p.grad for name, p in fused.named_parameters()}
    tune_layers(fused, batches(llama), objective=objective, teacher=llama.make(), steps=3, tokens=64)
    assert not any(p.requires_grad for p in fused.parameters())
    assert all(p.grad is gradients[name] for name, p in fused.named_parameters())


def test_an_interrupt_while_writing_leaves_all_of_it(monkeypatch):
    llama = BY_NAME["llama"]
    fused = get_peft_model(llama.make(), half(llama))
    before = logits(fused, llama)
    calls, real = iter(range(10**9)), torch.Tensor.copy_
    writing = []

    def interrupted(self, *args, **kwargs):
        if writing and next(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    write_all = ffn_outputs.write_all
    monkeypatch.setattr(ffn_outputs, "write_all", lambda pairs: (writing.append(1), write_all(pairs)))
    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune_layers(fused, batches(llama), steps=3, tokens=64)
    assert torch.equal(logits(fused, llama), before)
