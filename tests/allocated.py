"""Memory that tensors take, as it comes and goes."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Memory(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are still alive, and the most there have been."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.total = 0
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id_of(tensor) not in given and id_of(tensor) not in self.alive:
                storage = tensor.untyped_storage()
                self.alive.add(id_of(tensor))
                self.total += storage.nbytes()
                weakref.finalize(storage, self._free, id_of(tensor), storage.nbytes())
        self.peak = max(self.peak, self.total)
        return result

    def _free(self, key: int, size: int) -> None:
        self.alive.remove(key)
        self.total -= size


def id_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
