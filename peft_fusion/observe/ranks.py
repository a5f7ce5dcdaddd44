"""Several processes as one: where torch.distributed is initialised, what they see is added up and work is shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")
Item = TypeVar("Item")


def world() -> int:
    """How many processes there are; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if world() > 1 else 0


def share_of(count: int) -> int:
    """This process's share of so many things, at least one."""
    return max(1, (count - rank() + world() - 1) // world())


def owner(index: int) -> int:
    """The process that does the piece of work of this number."""
    return index % world()


def own(pieces: Sequence[Item]) -> Sequence[Item]:
    """The pieces of work that this process does."""
    return pieces[rank() :: world()]


def together(work: Callable[[], Result]) -> Result:
    """Does what a process does on its own; if that fails on one of them it fails on all, and none waits for it.

    Raises:
        RuntimeError: if it failed on another process; its error is in the message.
    """
    if world() == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as failure:  # told to the others, then raised
        error = failure
    told: list[str | None] = [None] * world()
    dist.all_gather_object(told, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = next((f"rank {i}: {text}" for i, text in enumerate(told) if text is not None), None)
    if failed is not None:
        raise RuntimeError(f"Another process failed, so this one stops as well. On {failed}")
    return result  # type: ignore[return-value]


def sum_of(number: float) -> float:
    """The sum of a number over the processes."""
    return float(sum_over_ranks(torch.tensor(float(number), dtype=torch.float64)))


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every process's tensor; all get the same bits."""
    if world() == 1:
        return tensor
    total = tensor.to(_device())
    dist.all_reduce(total)
    return total.to(tensor.device)


def joined_over_ranks(tensor: Tensor) -> Tensor:
    """Every process's rows, one after another: (n_r, ...) on each to (sum of n_r, ...) on all."""
    if world() == 1:
        return tensor
    counts = [torch.zeros(1, dtype=torch.int64, device=_device()) for _ in range(world())]
    dist.all_gather(counts, torch.tensor([len(tensor)], device=_device()))
    most = max(int(count) for count in counts)
    padded = tensor.new_zeros(most, *tensor.shape[1:]).to(_device())
    padded[: len(tensor)] = tensor.to(padded)
    gathered = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(count)] for part, count in zip(gathered, counts, strict=True)]).to(tensor.device)


def from_rank(source: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What one process holds, on all of them.

    Args:
        source: its number.
        tensors: on that process what is sent; on the others tensors of the same shapes and dtypes, not written to.
    """
    if world() == 1:
        return list(tensors)
    received = []
    for tensor in tensors:
        sent = tensor.to(_device(), copy=True).contiguous()
        dist.broadcast(sent, source)
        received.append(sent.to(tensor.device))
    return received


def object_from_rank(source: int, item: Result) -> Result:
    """A small picklable object that one process holds, on all of them."""
    if world() == 1:
        return item
    held = [item]
    dist.broadcast_object_list(held, source)
    return held[0]


def _device() -> torch.device:
    """Where tensors have to be for the processes to exchange them."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
