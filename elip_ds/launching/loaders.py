"""What the loaders of a node hold of its memory: batches made ahead, and the workers themselves.

Batches wait in shared memory (/dev/shm), of which a container often has 64 MiB; a rank that finds
it full dies of SIGBUS, without a word.
"""

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elip_ds.batching.sizes import show_bytes
from elip_ds.config import Config
from elip_ds.data.loader import PREFETCH

SHARED_MEMORY = Path("/dev/shm")
WORKER_BYTES = 45 * 10**6
"A worker's own, most of what it has being shared with its rank; measured, docs/performance.md."
IN_USE = 2
"Batches that a rank holds besides: the one it computes and the next."


@dataclass(frozen=True)
class LoaderBytes:
    """Of one rank. shared: in /dev/shm, of memory too.  own: the rest."""

    shared: int
    own: int

    @property
    def total(self) -> int:
        return self.shared + self.own


def loader_bytes(config: Config, micro_batch_size: int) -> LoaderBytes:
    """Of the training stream and of the held-out pairs, whose workers may run at the same time."""
    workers = config.data.workers
    if not workers:
        return LoaderBytes(0, 0)
    height, width = config.model.vision.pixels
    sample = 3 * height * width + 2 * 8 * config.data.text_length + 8
    both = sample * (micro_batch_size + config.eval.batch_size)
    return LoaderBytes(
        shared=both * (workers * PREFETCH + IN_USE),
        own=workers * (2 * WORKER_BYTES + both),  # a batch in the making
    )


def within_shared_memory(
    config: Config, sizes: Sequence[int], ranks: int, folder: Path = SHARED_MEMORY
) -> tuple[int, str]:
    """How many of the sizes, ascending, the shared memory of a node with so many ranks can hold,
    and why not the next one; "" where it holds all.
    """
    try:
        status = os.statvfs(folder)
    except OSError:  # no such thing on this system
        return len(sizes), ""
    if not status.f_blocks:  # without a bound of its own
        return len(sizes), ""
    free = status.f_bavail * status.f_frsize
    fits = bisect_right(sizes, free // ranks, key=lambda size: loader_bytes(config, size).shared)
    if fits == len(sizes):
        return fits, ""
    needed = loader_bytes(config, sizes[fits]).shared * ranks
    return fits, (
        f"{folder} has {show_bytes(free)} free, and what the loaders of {ranks} ranks make ahead "
        f"at micro-batch {sizes[fits]} takes {show_bytes(needed)}: lower data.workers="
        f"{config.data.workers}, or give a container more of it (docker --shm-size)"
    )
