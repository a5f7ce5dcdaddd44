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
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id_of(tensor) not in given | self.alive.keys():
                storage = tensor.untyped_storage()
                self.alive[id_of(tensor)] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, id_of(tensor), None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def id_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
