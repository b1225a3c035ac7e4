"""The bytes that a step makes, counted on tensors without data.

Under torch's FakeTensorMode every operation gives its result's shape and nothing is computed, so
that a step of any size takes seconds and no memory. Counted are storages, not tensors: a view costs
nothing, and a storage counts until the last that refers to it is gone. What was there before
(weights, buffers) is not counted.

What a kernel takes for itself while it runs (workspaces of cuBLAS and cuDNN, oneDNN's reordered
weights) is not seen.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elip_ds.batching.memory import Peaks
from elip_ds.batching.zero import Reduction

ROUNDED_TO_BYTES = 512
"Of torch's CUDA allocator, which gives nothing smaller; on a CPU it is next to nothing."


@dataclass(frozen=True)
class Traced:
    """The most bytes alive at once, phase by phase, beside what stays from step to step.

    kept: what is alive between forward and backward, by part of the model.
    """

    micro_batch_size: int
    peaks: Peaks
    kept: dict[str, int]


class Tracker(TorchDispatchMode):
    """Counts the storages that are made while it is open, on fake or on real tensors.

    part_of: says to which part of the model belongs what is made now.
    """

    def __init__(self, part_of: Callable[[], str] = lambda: "") -> None:
        super().__init__()
        self.alive_bytes = 0
        self._peak_bytes = 0
        self._part_of = part_of
        self._sizes: dict[int, tuple[int, str, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        mine = self._sizes
        new = [x for x in _storages(result) if x._cdata not in mine]
        if new:  # unless an argument has it: then it was there before, and this is a view or itself
            before = {x._cdata for x in _storages((args, kwargs))}
            for storage in new:
                if storage._cdata not in before:
                    self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._sizes:  # twice in one result
            return
        size = -(-storage.nbytes() // ROUNDED_TO_BYTES) * ROUNDED_TO_BYTES
        reference = weakref.ref(storage, lambda _: self._remove(key))
        self._sizes[key] = size, self._part_of(), reference
        self.alive_bytes += size
        self._peak_bytes = max(self._peak_bytes, self.alive_bytes)

    def _remove(self, key: int) -> None:
        self.alive_bytes -= self._sizes.pop(key)[0]

    def lap(self) -> int:
        """The most bytes alive at once since the last lap."""
        peak, self._peak_bytes = self._peak_bytes, self.alive_bytes
        return peak

    def alive_by_part(self) -> dict[str, int]:
        sizes: Counter[str] = Counter()
        for size, part, _ in self._sizes.values():
            sizes[part] += size
        return dict(sizes)


def trace_step(
    reduction: Reduction,
    *,
    micro_batch_size: int,
    micro_steps: int,
    forward: Callable[[int], Tensor],
    update: Callable[[], object],
    part_of: Callable[[], str] = lambda: "",
) -> Traced:
    """Run one optimizer step and count. Inside of a FakeTensorMode.

    reduction: what ZeRO does with the gradients.  forward: the number of a micro-batch -> its loss.
    update: what moves once the optimizer has stepped.
    """
    with Tracker(part_of) as tracker, reduction.hooked():
        forward_peaks, backward_peaks, kept = [], [], {}
        for micro_step in range(micro_steps):
            loss = forward(micro_step)
            forward_peaks.append(tracker.lap())
            kept = tracker.alive_by_part()
            loss.backward()
            del loss
            reduction.after_backward(last=micro_step == micro_steps - 1)
            backward_peaks.append(tracker.lap())
        reduction.step()
        update()
        peaks = Peaks(max(forward_peaks), max(backward_peaks), tracker.lap())
        return Traced(micro_batch_size, peaks, kept)


def _storages(tree: Any) -> list[Any]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]
