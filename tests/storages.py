"""What a computation leaves in memory: the storages that it made and that are still alive."""

from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(NamedTuple):
    """operation: such as aten.gelu.default.  shape, dtype: of its result, which owns nbytes."""

    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


class Storages(TorchDispatchMode):
    """Notes every storage that is made while it is open, views once.

    A weak reference keeps a storage's number taken, so none is mistaken for one that is gone.
    """

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {
            StorageWeakRef(x.untyped_storage())
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                ref = StorageWeakRef(x.untyped_storage())
                if ref not in before and ref not in self.made:
                    nbytes = x.untyped_storage().nbytes()
                    self.made[ref] = Made(str(function), tuple(x.shape), x.dtype, nbytes)
        return result

    def alive(self):
        return [made for ref, made in self.made.items() if not ref.expired()]

    def all(self):
        return list(self.made.values())


def sized(made, operation, shape=None):
    """Those of an operation, such as native_layer_norm, and of a shape."""
    return [m for m in made if operation in m.operation and shape in (None, m.shape)]
