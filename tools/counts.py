"""What a training step computes and keeps for its backward pass, by part of the model.

Operations are counted as elip_ds/engine/operations.py says.

Bytes come in two counts. `kept`: storages that were created during the forward and are alive at its
end, whatever keeps them. `saved`: storages that autograd was handed for its backward. Parameters,
buffers and the batch are in neither. The two agree where nothing is recomputed.
"""

import gc
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from elip_ds.engine.operations import CountingMode
from elip_ds.launching.parts import PARTS, current_part, listeners

_boundaries: list[tuple[int, str]] = []
"Number of the first autograd node that a part made, and the part, in order."


def _next_node() -> int:
    return torch._C._autograd._get_sequence_nr()


def _note(part: str) -> None:
    _boundaries.append((_next_node(), part))


listeners.append(_note)

# Counting.


@dataclass(frozen=True)
class Counts:
    """Of one step, by part. forward, backward: operations.  kept, saved: bytes."""

    forward: dict[str, int]
    backward: dict[str, int]
    kept: dict[str, int]
    saved: dict[str, int]


def count_step(
    forward: Callable[[], Any],
    total: Callable[[Any], Tensor],
    *,
    inputs: Iterable[Tensor],
    backward: bool = True,
) -> Counts:
    """Run a forward, and unless told otherwise the backward of the loss that total() finds in what
    it returns. On the CPU and on CUDA.

    inputs: what was there before: parameters, buffers, the batch.
    """
    with _Counter(inputs) as counter:
        with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda x: x):
            loss = total(forward())
        gc.collect()  # what lies in reference cycles is not needed by anything
        counter.end_forward()
        if backward:
            # In this thread: elsewhere nodes are numbered anew.
            with torch.autograd.set_multithreading_enabled(False):
                loss.backward()
    return counter.counts()


class _Counter(CountingMode):
    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        # By address. A weak reference keeps that of what is gone, so that no other storage gets it.
        self._inputs = [x.untyped_storage() for x in inputs]
        self._before = {x._cdata: StorageWeakRef(x) for x in self._inputs}
        self._created: dict[int, tuple[StorageWeakRef, str, int]] = {}
        self._packed: dict[int, StorageWeakRef] = {}
        self._operations: tuple[dict[str, int], dict[str, int]] = (_zeros(), _zeros())
        self._kept, self._saved = _zeros(), _zeros()
        self._forward_ends: int | None = None
        self._part = "heads"
        _boundaries.clear()
        _boundaries.append((0, current_part()))

    def run(self, func: Any, args: Any, kwargs: Any, formula: Callable[..., int] | None) -> Any:
        if self._forward_ends is None:
            self._note_arguments(args, kwargs)
        out = func(*args, **kwargs)
        kind = self._running()
        if formula is not None:
            phase = self._operations[0 if self._forward_ends is None else 1]
            phase[kind] += formula(*args, **kwargs, out_val=out)
        if self._forward_ends is None:
            for storage in _storages(out):
                if storage._cdata not in self._before and storage._cdata not in self._created:
                    entry = StorageWeakRef(storage), kind, storage.nbytes()
                    self._created[storage._cdata] = entry
        return out

    def _note_arguments(self, *arguments: Any) -> None:
        """What an operator reads and none has made was there before."""
        for storage in _storages(arguments):
            if storage._cdata not in self._created and storage._cdata not in self._before:
                self._before[storage._cdata] = StorageWeakRef(storage)

    def pack(self, x: Tensor) -> Tensor:
        """What autograd saves goes by here."""
        storage = x.untyped_storage()
        self._packed[storage._cdata] = StorageWeakRef(storage)
        return x.detach()  # the tensor itself might own the node that keeps it, and never go

    def end_forward(self) -> None:
        self._forward_ends = _next_node()
        for key, (reference, kind, size) in self._created.items():
            if not reference.expired():
                self._kept[kind] += size
                if key in self._packed:
                    self._saved[kind] += size

    def counts(self) -> Counts:
        return Counts(*self._operations, self._kept, self._saved)

    def _running(self) -> str:
        """In the backward, the part whose forward made the node that runs."""
        if self._forward_ends is None:
            return current_part()
        node = torch._C._current_autograd_node()
        # A node that a backward made, to recompute, belongs to the one that runs it.
        if node is not None and node._sequence_nr() < self._forward_ends:
            at = bisect_right(_boundaries, node._sequence_nr(), key=lambda entry: entry[0])
            self._part = _boundaries[at - 1][1]
        return self._part


def _storages(tree: Any) -> list[Any]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _zeros() -> dict[str, int]:
    return dict.fromkeys(PARTS, 0)
