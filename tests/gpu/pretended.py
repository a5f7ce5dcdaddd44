"""An accelerator without one: tensors that lie on it as far as anyone can tell, and are computed with on the CPU.

What a real one would refuse is refused: operands on two devices, and a CPU generator's draws on the device. What would
make the host wait for a real one is noted: values that are asked for, sizes that depend on values, copies to the host.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend("pretended", _Backend())
DEVICE = torch.device("pretended", 0)
aten = torch.ops.aten

BETWEEN_DEVICES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
WAITING = {
    aten._local_scalar_dense.default: "a value is read",
    aten.equal.default: "a value is read",
    aten.is_nonzero.default: "a value is read",
    aten.nonzero.default: "a size depends on values",
    aten.masked_select.default: "a size depends on values",
    aten._unique2.default: "a size depends on values",
    aten.unique_consecutive.default: "a size depends on values",
    aten.bincount.default: "a size depends on values",
    aten.repeat_interleave.Tensor: "a size depends on values",
    aten._assert_async.msg: None,
}


class WrongDevice(RuntimeError):
    """What a real device would refuse."""


class OnDevice(Tensor):
    """A tensor that says that it is on the device.

    Args:
        held: its values, in CPU memory.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def tolist(self) -> list[Any]:
        return self.cpu().tolist()

    def __repr__(self, **given: Any) -> str:
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, None)


class Device(TorchDispatchMode):
    """While it is entered, tensors can be made on the device. `waits` lists where the host would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __enter__(self) -> Device:
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes it on the CPU, then moves it
        return super().__enter__()

    def __exit__(self, *given: Any) -> None:
        super().__exit__(*given)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.waits)


def on_device(model: nn.Module) -> nn.Module:
    """Takes a model to the device."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return model.to(DEVICE)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def held(tensor: Tensor) -> Tensor:
    """A tensor's values, without moving it."""
    return tensor.held if isinstance(tensor, OnDevice) else tensor


def _run(func: Any, args: Any, kwargs: dict[str, Any], waits: list[str] | None) -> Any:
    """Computes on the CPU what would be computed on the operands' device."""
    operands = [item for item in tree_iter((args, kwargs)) if isinstance(item, Tensor)]
    here = any(isinstance(operand, OnDevice) for operand in operands)
    asked = kwargs.get("device")
    there = here if asked is None else torch.device(asked).type == DEVICE.type
    _check(func, operands, there, kwargs)
    if waits is not None and (here or there):
        _note(func, args, kwargs, here, there, waits)
    if asked is not None and there:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if func is aten._fused_sdp_choice.default and here:
        return 0  # the plain one, for others have kernels of their own for each device
    if torch.Tag.inplace_view in func.tags and here:
        _reshape_in_place(func, args, kwargs)
    own = {id(operand.held): operand for operand in operands if isinstance(operand, OnDevice)}
    result = func(*tree_map(held, args), **tree_map(held, kwargs))

    def wrapped(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        if id(item) in own:  # written to
            return own[id(item)]
        return OnDevice(item) if there else item

    return tree_map(wrapped, result)


def _reshape_in_place(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Changes what the outer tensor tells of its shape; the one that it holds follows."""
    before = torch._C._meta_in_tls_dispatch_include()
    torch._C._set_meta_in_tls_dispatch_include(True)
    try:
        with no_dispatch():
            func(*args, **kwargs)
    finally:
        torch._C._set_meta_in_tls_dispatch_include(before)


def _check(func: Any, operands: list[Tensor], there: bool, kwargs: dict[str, Any]) -> None:
    generator = kwargs.get("generator")
    if there and generator is not None and generator.device.type == "cpu":
        raise WrongDevice(f"{func}: a generator of the CPU cannot draw on the device")
    if func in BETWEEN_DEVICES or (func in INDEXING and isinstance(operands[0], OnDevice)):
        return
    on = [isinstance(operand, OnDevice) for operand in operands]
    if any(on) and not all(yes or operand.dim() == 0 for yes, operand in zip(on, operands, strict=True)):
        shapes = [f"{'device' if yes else 'cpu'} {tuple(o.shape)}" for yes, o in zip(on, operands, strict=True)]
        raise WrongDevice(f"{func}: operands on two devices, {', '.join(shapes)}")


def _note(func: Any, args: Any, kwargs: dict[str, Any], here: bool, there: bool, waits: list[str]) -> None:
    """Notes where the host would wait."""
    why = WAITING.get(func)
    if func is aten._to_copy.default and here != there and not kwargs.get("non_blocking"):
        why = "to the device" if there else "to the host"
    if func is aten.copy_.default and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        why = None if non_blocking else "to the device" if isinstance(args[0], OnDevice) else "to the host"
    if func in INDEXING:
        indices = [i for i in args[1] if isinstance(i, Tensor)]
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            why = "a size depends on values"
        elif any(not isinstance(i, OnDevice) for i in indices):
            why = "to the device"
    if why is not None:
        frames = [f for f in traceback.extract_stack() if "/peft_fusion/" in f.filename]
        place = f"{frames[-1].filename.rpartition('peft_fusion/')[2]}:{frames[-1].lineno}" if frames else "elsewhere"
        waits.append(f"{place} {frames[-1].name if frames else ''}: {why} ({func})")


@contextmanager
def waits_of(device: Device) -> Iterator[Callable[[], list[str]]]:
    """Those of a block."""
    start = len(device.waits)
    yield lambda: device.waits[start:]
