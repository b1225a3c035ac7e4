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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROUNDED_TO_BYTES = 512
"Of torch's CUDA allocator, which gives nothing smaller; on a CPU it is next to nothing."


@dataclass(frozen=True)
class Traced:
    """Bytes of one optimizer step beside weights, buffers and the optimizer.

    forward: the peak.  backward: the peak before the first gradient of a weight is done.
    gradients: the peak from then on.  left: what stays at the backward's end, gradients included
    that the ZeRO stage does not take away.  update: the peak after the optimizer, when the twin and
    the queues move.  kept: what is alive between forward and backward, by part of the model.
    """

    micro_batch_size: int
    forward: int
    backward: int
    gradients: int
    left: int
    update: int
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
    *,
    micro_batch_size: int,
    parameters: Iterable[Tensor],
    micro_steps: int,
    forward: Callable[[int], Tensor],
    update: Callable[[], object],
    keeps_gradients: bool,
    part_of: Callable[[], str] = lambda: "",
) -> Traced:
    """Run one optimizer step, without its optimizer, and count. Inside of a FakeTensorMode.

    parameters: those that get a gradient.  forward: the number of a micro-batch -> its loss.
    update: what moves once the optimizer has stepped.  keeps_gradients: weights have a gradient of
    their own until the optimizer's end (ZeRO 0, 1); otherwise a gradient goes to a bucket, which is
    not counted here, as soon as it is done.
    """
    parameters = list(parameters)
    with Tracker(part_of) as tracker:
        first: list[int] = []

        def done(parameter: Tensor) -> None:
            if not first:
                first.append(tracker.lap())
            if not keeps_gradients:
                parameter.grad = None

        handles = [p.register_post_accumulate_grad_hook(done) for p in parameters]
        peaks, kept = [], {}
        for micro_step in range(micro_steps):
            first.clear()
            loss = forward(micro_step)
            forward_peak, kept = tracker.lap(), tracker.alive_by_part()
            loss.backward()
            del loss
            rest = tracker.lap()
            peaks.append((forward_peak, first[0] if first else rest, rest))
        left = tracker.alive_bytes
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.grad = None
        tracker.lap()
        update()
        highest = [max(column) for column in zip(*peaks, strict=True)]
        return Traced(micro_batch_size, *highest, left, tracker.lap(), kept)


def _storages(tree: Any) -> list[Any]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]
