"""How much of this machine's memory one rank has for a model and its steps."""

import time
from dataclasses import dataclass, replace

import psutil

from elip_ds.batching.devices import KAPPA, OUTSIDE_BYTES, find_device
from elip_ds.batching.sizes import show_bytes
from elip_ds.config import Config
from elip_ds.config.schema import BatchingConfig
from elip_ds.launching.endings import DeviceBusy
from elip_ds.launching.limits import Limit, cuda_budget, host_limits, read_gpus
from elip_ds.launching.loaders import loader_bytes

HEADROOM = {"cpu": 0.05, "cuda": 0.06}
"Share of the memory that is left free, where nothing else is said; see left_free."
HEADROOM_BYTES = {"cpu": 0, "cuda": 2**30}
ENDING_SECONDS = 20.0
"For the processes of an earlier start to give a device's memory back."
REPEATS = {"cpu": 2 * 2**20, "cuda": 0}
"""Bytes by which peaks of one and the same batch differ from start to start, always left free:
up to 1 MiB was seen on a CPU, and a sample more or less is soon as small as that."""


@dataclass(frozen=True)
class Memory:
    """Of one rank on this node.

    limit: what there is, and what says so.  headroom_bytes: to be left free.
    outside_bytes: taken by what no plan counts.  kappa: bytes taken for each that a plan counts.
    share: on a CPU of the node's memory, out of which comes what the rank's loader takes, too.
    """

    name: str
    limit: Limit
    headroom_bytes: int
    outside_bytes: int
    kappa: float
    share: Limit | None = None

    @property
    def budget_bytes(self) -> int:
        return self.limit.bytes - self.headroom_bytes

    def taken(self, planned_bytes: int) -> int:
        return int(planned_bytes * self.kappa) + self.outside_bytes

    def planned(self, taken_bytes: float) -> int:
        """The inverse of taken."""
        return int((taken_bytes - self.outside_bytes) / self.kappa)


def node_memory(config: Config, local_ranks: int, device: str) -> Memory:
    """Raises DeviceBusy when nobody can say how much there is."""
    batching = config.batching
    given, known, share = None, None, None
    if batching.device_memory is not None:
        known = find_device(batching.device_memory)
        given = known.memory_bytes
    if device == "cuda":
        limit, name = _once_free(local_ranks, given)
        outside, kappa = OUTSIDE_BYTES, KAPPA
    else:
        limits, name = host_limits(local_ranks, given_bytes=given), "cpu"
        limit = min(limits, key=lambda limit: limit.bytes)
        share = min((x for x in limits if x.of_node), key=lambda limit: limit.bytes)
        share = replace(share, bytes=_steady(share.bytes))
        # This process has imported what a rank imports, once it has this, which torch's optimizers
        # import when the first is made, and done little else.
        import torch._dynamo  # noqa: F401

        outside, kappa = psutil.Process().memory_info().rss, 1.0
    if limit.bytes != given:
        limit = replace(limit, bytes=_steady(limit.bytes))
    free = left_free(batching, limit.bytes - outside, device)
    return Memory(name, limit, free, outside, kappa, share)


def _once_free(ranks: int, given_bytes: int | None) -> tuple[Limit, str]:
    """What a rank has of its device, and the device's name, waiting a little for processes of the
    start before this one to end.
    """
    end = time.monotonic() + ENDING_SECONDS
    while True:
        gpus = read_gpus()
        try:
            return cuda_budget(ranks, gpus, given_bytes), gpus[0].name
        except DeviceBusy:
            if time.monotonic() > end:
                raise
        time.sleep(1)


def left_free(batching: BatchingConfig, usable_bytes: int, device: str) -> int:
    """Headroom in bytes, at least what a start may take more than the one that was measured.

    usable_bytes: what there is for the model and its steps, since what a process takes before it
    has either does not grow.
    """
    share, least = batching.headroom, batching.headroom_bytes
    share = HEADROOM[device] if share == "auto" else float(share)
    least = HEADROOM_BYTES[device] if least == "auto" else int(least)
    return max(int(share * usable_bytes), least, REPEATS[device])


def least_memory(batching: BatchingConfig, taken: int, outside: int, device: str) -> int:
    """Bytes that suffice for a rank that takes so many, outside of them, and what is left free."""
    least, before = taken, 0
    while least > before:
        least, before = taken + left_free(batching, least - outside, device), least
    return least


def _steady(number: int) -> int:
    """Rounded down, by 1.5 % at most: what is free differs a little from start to start."""
    step = 1 << max(0, number.bit_length() - 7)
    return number // step * step


def beside_loader(config: Config, memory: Memory, micro_batch_size: int) -> Memory:
    """A rank's, with what its loader then takes taken off its share of the node's memory."""
    taken = loader_bytes(config, micro_batch_size).total
    if memory.share is None or memory.share.bytes - taken >= memory.limit.bytes:
        return memory
    name = f"{memory.share.name}, less {show_bytes(taken)} for its loader"
    less = replace(memory.share, name=name, bytes=memory.share.bytes - taken)
    return replace(memory, limit=less)
