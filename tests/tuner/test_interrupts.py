"""An interrupt while an adapter is made or loaded leaves the model as it was, wherever it comes; then it works."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import peft
import pytest
import torch
from architectures import BY_NAME
from helpers import half, logits
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from torch import Tensor, nn

import peft_fusion
from peft_fusion import FusionConfig, calibrate
from peft_fusion.tuner.layer import FusionLayer

pytestmark = pytest.mark.slow

LLAMA, BERT = BY_NAME["llama"], BY_NAME["bert"]
POINTS = 6
SOURCES = (str(Path(peft_fusion.__file__).parent), str(Path(peft.__file__).parent / "tuners"))
UNDOING = ("transaction.py", "loading.py")  # what takes back cannot be taken back itself


@dataclass
class Interrupter:
    """Counts the lines that are run inside a function, and raises at one of them.

    Args:
        inside: the code of the functions in which lines count.
        at: which line to raise at; None for none.
        sources: where the files lie whose lines count.
    """

    inside: set[Any]
    at: int | None = None
    sources: tuple[str, ...] = SOURCES
    lines: int = 0
    depth: list[FrameType] = field(default_factory=list)

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "call" and frame.f_code in self.inside:
            self.depth.append(frame)
        if event == "return" and self.depth and frame is self.depth[-1]:
            self.depth.pop()
        name = frame.f_code.co_filename
        counts = name.startswith(self.sources) and not name.endswith(UNDOING)
        if not counts and frame.f_code not in self.inside:
            return None  # no events of a frame whose lines do not count: they would take most of the time
        if event == "line" and self.depth and counts:
            self.lines += not is_with(frame)
            if self.lines == self.at and not is_with(frame):
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def is_with(frame: FrameType) -> bool:
    """Whether a frame is at a `with` statement, which Python cannot leave by an exception once its block has ended."""
    path = Path(frame.f_code.co_filename)
    return frame.f_lineno in WITHS.setdefault(
        path, {i for i, line in enumerate(path.read_text().split("\n"), 1) if "with " in line}
    )


WITHS: dict[Path, set[int]] = {}


@contextmanager
def traced(interrupter: Interrupter) -> Iterator[Interrupter]:
    before = sys.gettrace()
    sys.settrace(interrupter)
    try:
        yield interrupter
    finally:
        sys.settrace(before)


def fresh(calibrated: bool = False) -> nn.Module:
    model = LLAMA.make(num_hidden_layers=2)
    if calibrated:
        calibrate(model, half(LLAMA), [LLAMA.batch(labels=True, seed=seed, size=8) for seed in range(3)])
    return model


def with_one(**settings: Any) -> nn.Module:
    return get_peft_model(fresh(), half(LLAMA, seed=1, base_weights="offload", **settings))


def lora(mixed: bool) -> nn.Module:
    return get_peft_model(fresh(), LoraConfig(target_modules=["q_proj"], r=2), mixed=mixed)


def loaded(folder: Path) -> Callable[[nn.Module], nn.Module]:
    def load(model: nn.Module) -> nn.Module:
        if isinstance(model, (PeftModel, PeftMixedModel)):
            model.load_adapter(folder, "second")
            model.set_adapter("second")
            return model
        return PeftModel.from_pretrained(model, folder)

    return load


def loaded_natively(folder: Path) -> Callable[[nn.Module], nn.Module]:
    def load(model: nn.Module) -> nn.Module:
        model.load_adapter(str(folder))
        return model

    return load


LOADING: dict[str, tuple[Callable[[], nn.Module], Callable[[Path], Callable], Any]] = {
    "from_pretrained": (fresh, loaded, PeftModel.from_pretrained.__func__),
    "load_adapter": (with_one, loaded, PeftModel.load_adapter),
    "load_adapter, mixed": (lambda: lora(mixed=True), loaded, PeftModel.load_adapter),
    "load_adapter, native": (fresh, loaded_natively, type(fresh()).load_adapter),
}


def narrow_weights(model: nn.Module) -> list[Tensor]:
    return [p for m in model.modules() if isinstance(m, FusionLayer) for p in m.mlp_fusion_narrow.parameters()]


def interrupted_everywhere(make: Callable[[], nn.Module], act: Callable, inside: set[Any], unchanged: Any) -> None:
    expected = make()
    with traced(Interrupter(inside)) as counted:
        expected = act(expected)
    assert counted.lines > 100
    model = make()
    for point in range(POINTS):
        check = unchanged(model)
        at = 1 + point * (counted.lines - 1) // (POINTS - 1)
        with pytest.raises(KeyboardInterrupt), traced(Interrupter(inside, at)):
            act(model)
        check()
    again = act(model)
    assert torch.equal(logits(again, LLAMA), logits(expected, LLAMA))
    weights = zip(narrow_weights(again), narrow_weights(expected), strict=True)
    assert all(torch.equal(a, b) and a.requires_grad == b.requires_grad for a, b in weights)


@pytest.mark.parametrize("case", LOADING)
def test_an_interrupt_while_an_adapter_is_loaded(case, tmp_path, unchanged):
    make, act, method = LOADING[case]
    get_peft_model(fresh(), half(LLAMA, base_weights="offload")).save_pretrained(tmp_path)
    interrupted_everywhere(make, act(tmp_path), {method.__wrapped__.__code__}, unchanged)


PEFTS_OWN = tuple(str(Path(peft.__file__).parent / name) for name in ("peft_model.py", "mixed_model.py", "utils/other"))
ADDING: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, FusionConfig], nn.Module], Any]] = {
    "get_peft_model": (BERT.make, get_peft_model, peft.PeftModelForSequenceClassification.__init__),
    "get_peft_model, mixed": (
        BERT.make,
        lambda model, config: get_peft_model(model, config, mixed=True),
        PeftMixedModel.__init__,
    ),
    "add_adapter": (
        lambda: get_peft_model(BERT.make(), half(BERT), "first"),
        lambda model, config: (model.add_adapter("second", config), model)[1],
        peft.PeftModelForSequenceClassification.add_adapter,
    ),
}


@pytest.mark.parametrize("case", ADDING)
def test_an_interrupt_in_what_peft_does_before_and_after_the_tuner(case, unchanged):
    make, put, method = ADDING[case]
    inside = {method.__wrapped__.__code__}
    config = half(BERT, modules_to_save=["pooler"])
    with traced(Interrupter(inside, sources=PEFTS_OWN)) as counted:
        put(make(), copy.deepcopy(config))
    assert counted.lines > 30
    model, asked = make(), copy.deepcopy(vars(config))
    for at in range(1, counted.lines + 1, -(-counted.lines // 10)):
        check = unchanged(model)
        with pytest.raises(KeyboardInterrupt), traced(Interrupter(inside, at, PEFTS_OWN)):
            put(model, config)
        check()
        assert vars(config) == asked
    assert any(isinstance(module, FusionLayer) for module in put(model, config).modules())
