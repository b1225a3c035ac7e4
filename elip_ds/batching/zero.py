"""What DeepSpeed's ZeRO holds on one rank beside a step's own tensors.

states() is a closed form of all that stays from step to step. Reduction does with fake gradients
what DeepSpeed does with real ones: where buckets, flat copies and shards are allocated in a step
decides whether they come on top of its activations or after them.

Source: deepspeed/runtime/zero/stage_1_and_2.py, stage3.py and fp16/unfused_optimizer.py of 0.19,
for an optimizer with two fp32 states that works in place (torch's fused AdamW, our LAMB).

P trainable and F frozen parameters, N ranks, s bytes of a weight (4, or 2 in half precision).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from elip_ds.batching.gather import Gathering, Limits

ALL_REDUCED_AT_ONCE = 500_000_000
"Elements that the engine puts into one message at stage 0; no setting changes it."


LIMITS = {
    "stage3_param_persistence_threshold": "persist",
    "stage3_prefetch_bucket_size": "ahead",
    "stage3_max_live_parameters": "live",
    "stage3_max_reuse_distance": "reuse",
}


@dataclass(frozen=True)
class Zero:
    """world_size: 0 is a step by itself, without an engine, whose optimizer needs nothing.
    dtype: of the weights.  accumulate: of gradients between micro-batches.  bucket: elements.
    gather: of stage 3.  copies: whether a message is copied on its way, as gloo does with what it
    gathers or scatters.  offload: the optimizer, or the optimizer and the weights, lie on the host.
    """

    stage: int
    world_size: int
    dtype: torch.dtype = torch.float32
    accumulate: torch.dtype = torch.float32
    bucket: int = 500_000_000
    overlap: bool = False
    gather: Limits = field(default_factory=Limits)
    copies: bool = False
    offload: bool = False
    offload_weights: bool = False

    @property
    def half(self) -> bool:
        return self.dtype != torch.float32


@dataclass(frozen=True)
class Weights:
    """Elements of every parameter: trainable ones by group of the optimizer, in order, and frozen
    ones.  other_bytes: of buffers, such as queues.  twin: the frozen ones follow the others.
    """

    trainable: Sequence[Sequence[int]]
    frozen: Sequence[int]
    other_bytes: int
    twin: bool


def read_zero(tree: dict[str, Any], world_size: int, dtype: torch.dtype) -> Zero:
    """tree: the complete DeepSpeed configuration, nothing left "auto"."""
    zero = tree.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    wanted = (tree.get("data_types") or {}).get("grad_accum_dtype")
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

    def offloads(key: str) -> bool:
        return (zero.get(key) or {}).get("device", "none") != "none"

    return Zero(
        stage=stage,
        world_size=world_size,
        dtype=dtype,
        accumulate=names[wanted] if wanted else dtype,
        bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
        overlap=bool(zero.get("overlap_comm", stage == 3)),
        gather=Limits(**{name: int(zero[key]) for key, name in LIMITS.items() if key in zero}),
        offload=offloads("offload_optimizer"),
        offload_weights=offloads("offload_param"),
    )


def states(weights: Weights, zero: Zero) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by part that stay from the second step on: on the device, and on the host.

    On a CPU the two are one memory.
    """
    count, size = zero.world_size, zero.dtype.itemsize
    trainable = [n for group in weights.trainable for n in group]
    device = {
        "parameters": size * _held(trainable, zero),
        "teacher": size * _held(weights.frozen, zero),
        "queues and buffers": weights.other_bytes,
    }
    if weights.twin and zero.half:
        # Its fp32 averages (models/ema.py): of what this rank holds.
        shards = count if zero.stage == 3 else 1
        device["teacher's averages"] = 4 * sum(-(-n // shards) for n in weights.frozen)
    mine = sum(trainable)
    if zero.stage in (1, 2):
        mine = sum(shard(group, count) for group in weights.trainable)
    elif zero.stage == 3:
        mine = sum(-(-n // count) for n in trainable)
    # ZeRO copies the weights for the optimizer even where they are fp32 already.
    copied = zero.half or zero.stage > 0
    optimizer, host = (12 if copied else 8) * mine, {}
    if zero.offload:
        # Gradients and a copy in the weights' precision stay there, too.
        host["optimizer"] = optimizer + (4 + size) * mine + size * max(trainable)
        device["offload buffer"] = size * max(trainable)
    else:
        device["optimizer"] = optimizer
    if zero.stage == 3:
        place = host if zero.offload else device
        place["gradients"] = zero.accumulate.itemsize * mine
        device["buckets"] = size * zero.bucket
    if zero.stage == 1 and zero.half and zero.accumulate == torch.float32:
        device["gradients"] = 4 * sum(trainable)  # BF16_Optimizer
    if zero.offload_weights:
        host["parameters"] = device.pop("parameters")
    return device, host


def shard(group: Sequence[int], world_size: int) -> int:
    """Elements of a group on one rank at stages 1 and 2, filled up to an even number on each."""
    return -(-sum(group) // (2 * world_size)) * 2


def _held(sizes: Sequence[int], zero: Zero) -> int:
    """Elements that a rank has of the weights."""
    if zero.stage < 3 or zero.world_size == 1:
        return sum(sizes)
    shards = sum(-(-n // zero.world_size) for n in sizes)
    return shards + sum(n for n in sizes if n <= zero.gather.persist)


def most_owned(group: Sequence[int], world_size: int) -> int:
    """Stages 1 and 2: elements of the parameters of which a rank owns at least a piece, on the rank
    that has most: their gradients are kept whole.
    """
    length, ends, at = shard(group, world_size), [], 0
    for n in group:
        ends.append((at, at + n, n))
        at += n
    most = 0
    first = 0
    for rank in range(world_size):
        low, high = rank * length, (rank + 1) * length
        while first < len(ends) and ends[first][1] <= low:
            first += 1
        most = max(most, sum(n for start, _, n in ends[first:] if start < high))
    return most


class Reduction:
    """Gradients on their way to the optimizer; on fake tensors, nothing is sent anywhere.

    groups: trainable parameters by group of the optimizer.  gathering: of stage 3.
    """

    def __init__(
        self, zero: Zero, groups: Sequence[Sequence[Tensor]], gathering: Gathering | None = None
    ) -> None:
        assert (gathering is not None) == (zero.stage == 3), "stage 3 gathers, and it alone"
        self.zero, self.groups, self.gathering = zero, groups, gathering
        self._all = [p for group in groups for p in group]
        # Stage 1 without overlap reduces when the backward is over.
        self._late = zero.stage == 0 or (zero.stage == 1 and not zero.overlap)
        self._forget()

    def _forget(self) -> None:
        self._buffers: list[Tensor] = []
        self._fill, self._alone = 0, True
        self._large: Tensor | None = None
        self._owned: list[Tensor] = []

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """While it is open, gradients go this way as soon as they are done."""
        handles = [p.register_post_accumulate_grad_hook(self._take) for p in self._all]
        try:
            with self.gathering.hooked() if self.gathering else nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._forget()

    def _take(self, parameter: Tensor) -> None:
        zero = self.zero
        if zero.stage in (1, 2) and not self._buffers:
            both = 2 if zero.overlap else 1
            self._buffers = [self._empty(zero.bucket, self._bucket_dtype) for _ in range(both)]
        if not self._late:
            self._put(parameter)

    @property
    def _bucket_dtype(self) -> torch.dtype:
        return self.zero.accumulate if self.zero.stage == 1 else self.zero.dtype

    def _put(self, parameter: Tensor) -> None:
        n = parameter.numel()
        if self._fill and self._fill + n > self.zero.bucket:
            self._reduce()
        if n > self.zero.bucket:  # does not fit, and stays where it is until it is reduced
            self._large = parameter.grad
        parameter.grad = None
        self._alone = self._fill == 0
        self._fill += n

    def _reduce(self) -> None:
        """One message: a flat copy of what is in the bucket, and what this rank owns of it."""
        zero = self.zero
        # At stage 3 a gradient by itself that needs no filling up is sent from where it is.
        in_place = zero.stage == 3 and self._alone and self._fill % zero.world_size == 0
        flat = self._empty(0 if in_place else self._fill, self._bucket_dtype)
        if zero.stage == 3:
            copy = self._empty(self._fill if zero.copies else 0, zero.dtype)
            del copy
            if zero.accumulate != zero.dtype:
                own = self._empty(-(-self._fill // zero.world_size), zero.accumulate)
                del own
        elif not self._owned and not zero.offload:
            if zero.accumulate == torch.float32 and zero.half:
                owned = sum(shard(sizes, zero.world_size) for sizes in self._sizes())
            else:
                owned = sum(most_owned(sizes, zero.world_size) for sizes in self._sizes())
            self._owned = [self._empty(owned, zero.accumulate)]
        del flat
        self._fill, self._large = 0, None

    def after_backward(self, *, last: bool) -> None:
        """last: of the step's micro-batches."""
        zero = self.zero
        if self.gathering:
            self.gathering.end_backward()
        if zero.stage == 0 and last and zero.world_size:
            count = min(sum(p.numel() for p in self._all), ALL_REDUCED_AT_ONCE)
            flat = self._empty(count, zero.dtype)
            del flat
        elif not self._late or (zero.stage == 1 and last):
            held, self._owned = self._owned, []
            for parameter in self._all if self._late else ():
                if parameter.grad is not None:
                    self._put(parameter)
            self._reduce()
            self._owned = held or self._owned  # what is new is added to what was there
            self._buffers = []

    def step(self) -> None:
        """The gradients become fp32, group by group, and are gone with the step."""
        zero = self.zero
        if zero.stage == 0:
            if zero.half and zero.world_size:
                flats = [self._empty(p.numel(), torch.float32) for p in self._all]
                del flats
            for parameter in self._all:
                parameter.grad = None
            return
        for sizes in self._sizes() if not zero.offload else ():
            if zero.stage == 3:
                self._step_shards(sizes)
                continue
            flat = self._empty(shard(sizes, zero.world_size), zero.accumulate)
            single = flat.float()  # itself where it is fp32
            del flat, single
        self._owned = []

    def _step_shards(self, sizes: Sequence[int]) -> None:
        """Stage 3 drops the weights that are always whole while the optimizer steps."""
        assert self.gathering
        self.gathering.step()
        zero = self.zero
        count = sum(-(-n // zero.world_size) for n in sizes)
        needed = count * (zero.accumulate.itemsize + (4 if zero.accumulate.itemsize < 4 else 0))
        dropped = self.gathering.persistent() * zero.dtype.itemsize
        flat = self._empty(max(0, needed - dropped), torch.uint8)
        del flat

    def _sizes(self) -> list[list[int]]:
        return [[p.numel() for p in group] for group in self.groups]

    @staticmethod
    def _empty(count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype)
