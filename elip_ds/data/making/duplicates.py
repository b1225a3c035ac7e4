"""Which samples show the very bytes of an earlier one; found before any shard is made.

The first in the order of the listing stays, with its own captions: a picture that stands for a
thousand missing ones would otherwise collect a thousand captions.
"""

import hashlib
import io
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np

from elip_ds.data.making.crew import run_tasks
from elip_ds.data.making.listing import Listing, read_items
from elip_ds.data.making.one_shard import Job, Reader, Task, with_captions, write_whole
from elip_ds.data.record import BadSample
from elip_ds.errors import UserError

DIGEST_BYTES = 16


def find_duplicates(
    job: Job, listing: Listing, ranges: list[range], workers: int, advance: Callable[[int], None]
) -> dict[int, str]:
    """Sample of the listing -> key of the first with the same bytes. Kept from start to start."""
    missing = []
    for number, samples in enumerate(ranges):
        if _hashes(job, number).is_file():
            advance(len(samples))
        else:
            missing.append(Task(number, samples, int(listing.starts[samples.start])))
    with closing(run_tasks(Hasher(job), missing, workers, advance)) as done:
        for _ in done:
            pass
    hashes = np.concatenate([np.load(_hashes(job, i)) for i in range(len(ranges))])
    return {
        int(later): next(read_items(job.listing, int(listing.starts[first]), 1)).key
        for later, first in repeats(hashes)
    }


def repeats(hashes: np.ndarray) -> list[tuple[int, int]]:
    """(later, first) rows that are alike; rows of zeros are unknown and like none.

    hashes: (N, DIGEST_BYTES), uint8.
    """
    rows = np.ascontiguousarray(hashes).view(f"V{DIGEST_BYTES}").ravel()
    _, firsts, groups = np.unique(rows, return_index=True, return_inverse=True)
    first = firsts[groups]
    later = np.flatnonzero((first != np.arange(len(rows))) & hashes.any(axis=1))
    return [(int(i), int(first[i])) for i in later]


class Hasher(Reader):
    """Reads the images of a shard-to-be."""

    def __call__(self, task: Task, advance: Callable[[int], None]) -> int:
        hashes = np.zeros((len(task.samples), DIGEST_BYTES), np.uint8)
        items = read_items(self.job.listing, task.start, len(task.samples))
        for i, item in enumerate(items):
            try:
                image = with_captions(self.source.read(item)).image
            except BadSample:  # it makes no shard, so none may be left out for it
                pass
            else:
                digest = hashlib.blake2b(image, digest_size=DIGEST_BYTES).digest()
                hashes[i] = np.frombuffer(digest, np.uint8)
            advance(1)
        buffer = io.BytesIO()
        np.save(buffer, hashes)
        try:
            write_whole(_hashes(self.job, task.number), buffer.getvalue())
        except OSError as error:
            raise UserError(f"--out {self.job.folder}: {error.strerror}") from None
        return task.number


def _hashes(job: Job, number: int) -> Path:
    return job.state / f"{number:06d}.npy"
