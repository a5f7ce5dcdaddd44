"""Every narrow FFN on its own learns to put out what the original one does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..ffn import FFN, run_ffn
from ..fidelity.outputs import padding_mask
from ..fidelity.pair import Batch, Side, active_narrow
from ..fisher import fisher_information
from ..fusing.kernels import metric_root
from ..gradients import single_sentences
from ..layer import FusionLayer
from ..progress import progress
from ..tangents import MOST_SENTENCES

BATCH_TOKENS = 1024
CHECKS = 10  # how often the held-out error is looked at
HELD_OUT = 8  # one token in so many is held out


def tune_ffn_outputs(
    original: Side,
    fused: Side,
    dataloader: Iterable[Batch],
    learning_rate: float,
    steps: int,
    tokens: int,
    seed: int,
) -> dict[str, tuple[float, float]]:
    """Tunes every narrow FFN; see `tune_layers`, objective "ffn"."""
    with original.running():
        inputs, sentences = _collect_inputs(original, dataloader, tokens)
        fisher = fisher_information(original, sentences, seed) or {}
        errors = {}
        pairs = list(zip(original.ffns, fused.ffns, strict=True))
        for teacher, student in progress(pairs, "Tuning FFNs"):
            x = inputs.pop(teacher.name)
            with torch.no_grad():
                y = torch.cat([run_ffn(teacher, teacher.base_projections, part) for part in x.split(BATCH_TOKENS)])
            root = metric_root(fisher[teacher.name].to(y.device)) if teacher.name in fisher else None
            errors[student.name] = _fit(_Student(student, root), x, y, learning_rate, steps, seed)
    return errors


class _Student:
    """A narrow FFN that learns: maps inputs (tokens, in_dim) to outputs in the metric's coordinates, in float32.

    Args:
        ffn: its projections, fusion layers or plain modules.
        root: of the metric in which errors are measured, (out_dim, out_dim); None: the plain one.
    """

    def __init__(self, ffn: FFN, root: Tensor | None) -> None:
        self.ffn, self.root = ffn, root
        self.modules = [narrow for layer in ffn.projections if (narrow := _narrow(layer)) is not None]
        self.parameters = [parameter for module in self.modules for parameter in module.parameters()]

    def __call__(self, x: Tensor) -> Tensor:
        """The products are in bfloat16 where it is fast.

        Its rounding, 0.4 % of a value, is far below what a narrow FFN misses, and the weights stay in float32.
        """
        with torch.autocast(x.device.type, torch.bfloat16, enabled=_fast_bfloat16(x.device)):
            y = run_ffn(self.ffn, self.modules, x).float()
        return self.seen(y)

    def seen(self, y: Tensor) -> Tensor:
        """Outputs (tokens, out_dim) in the metric's coordinates."""
        return y if self.root is None else y @ self.root

    @torch.no_grad()
    def error(self, x: Tensor, y: Tensor) -> float:
        """The relative squared error on inputs whose right outputs, in the metric's coordinates, are y."""
        return float((self(x) - y).square().sum() / y.square().sum().clamp(min=1e-30))


def _collect_inputs(side: Side, dataloader: Iterable[Batch], tokens: int) -> tuple[dict[str, Tensor], list[Batch]]:
    """The inputs of every FFN, tensors of shape (tokens, in_dim), without padding, and some sentences.

    Raises:
        ValueError: if the data loader gives no batch that the model takes.
    """
    kept: dict[str, list[Tensor]] = {ffn.name: [] for ffn in side.ffns}
    sentences: list[Batch] = []
    with ExitStack() as stack, torch.no_grad():
        current: dict[str, Any] = {}
        for ffn in side.ffns:
            handle = ffn.projections[0].register_forward_pre_hook(
                _keeper(kept[ffn.name], current, side.decodes and "decoder" in ffn.name.split("."))
            )
            stack.callback(handle.remove)
        for batch in dataloader:
            current.clear()
            current.update(batch)
            side({key: value for key, value in batch.items() if key != "labels" or _needs_labels(side, batch)})
            sentences += islice(single_sentences(batch), MOST_SENTENCES - len(sentences))
            if min(sum(map(len, found)) for found in kept.values()) >= tokens:
                break
    if not all(kept.values()):
        raise ValueError("The dataloader yields no batch: give one that can be iterated anew, with at least one batch.")
    return {name: torch.cat(found)[:tokens] for name, found in kept.items()}, sentences


def _needs_labels(side: Side, batch: Batch) -> bool:
    """Whether an encoder-decoder makes its decoder's inputs from the labels."""
    return side.decodes and "decoder_input_ids" not in batch


def _keeper(kept: list[Tensor], batch: Batch, decoder: bool) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that keeps an FFN's inputs."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        mask = padding_mask(batch, args[0].shape, decoder)
        kept.append(args[0].flatten(0, -2) if mask is None else args[0][mask.to(args[0].device)])

    return hook


def _fit(student: _Student, x: Tensor, y: Tensor, learning_rate: float, steps: int, seed: int) -> tuple[float, float]:
    """Fits a narrow FFN to outputs y of inputs x; returns the held-out error before and after."""
    parameters = student.parameters
    dtypes = {parameter: parameter.dtype for parameter in parameters}
    for parameter in parameters:
        parameter.data = parameter.data.float()  # half-precision weights would not move by small steps
        parameter.requires_grad_(True)
    held_out = torch.arange(len(x), device=x.device) % HELD_OUT == HELD_OUT - 1
    x, y = x.float(), student.seen(y.float())
    test = (x[held_out], y[held_out])
    before = student.error(*test)
    best, kept = before, [parameter.detach().clone() for parameter in parameters]
    with torch.enable_grad():
        for _ in _adam(student, x[~held_out], y[~held_out], learning_rate, steps, seed):
            error = student.error(*test)
            if error < best:
                best, kept = error, [parameter.detach().clone() for parameter in parameters]
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.grad = None
        parameter.data = value.to(dtypes[parameter])
    return before, best


def _adam(student: _Student, x: Tensor, y: Tensor, learning_rate: float, steps: int, seed: int) -> Iterator[None]:
    """Takes Adam's steps along a cosine, and stops now and then for a look at the held-out error."""
    sizes = [(p, learning_rate * float(p.detach().square().mean().sqrt())) for p in student.parameters]
    adam = torch.optim.Adam([{"params": [parameter], "lr": rate} for parameter, rate in sizes if rate])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    generator = torch.Generator().manual_seed(seed)
    unit = y.square().mean()
    for step in range(1, steps + 1):
        rows = torch.randint(0, len(x), (min(BATCH_TOKENS, len(x)),), generator=generator).to(x.device)
        loss = (student(x[rows]) - y[rows]).square().mean() / unit
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        if step % max(1, steps // CHECKS) == 0 or step == steps:
            yield


def _fast_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _narrow(layer: nn.Module) -> nn.Module | None:
    return active_narrow(layer) if isinstance(layer, FusionLayer) else layer
