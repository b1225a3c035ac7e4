"""The plan of the shards: every sample of a source in order, under the key that it will have.

Shard i holds samples [i * per_shard, (i + 1) * per_shard) of the order; what turns out to be
unusable is missing from its shard and moves no other.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO

import numpy as np

from elip_ds.data.raw import Item, RawSource

LONGEST_KEY = 80
"Characters; a tar header has room for 100, with the extension."


@dataclass(frozen=True)
class Listing:
    """digest: of all that the source listed.  starts: (samples + 1,), byte of each line.

    renamed: the keys that came twice and got a number, in order.
    """

    samples: int
    digest: str
    starts: np.ndarray
    renamed: tuple[str, ...]


def shard_ranges(samples: int, per_shard: int) -> list[range]:
    """Of each shard the samples that it is to hold."""
    return [range(start, min(start + per_shard, samples)) for start in range(0, samples, per_shard)]


def list_items(source: RawSource, out: BinaryIO | None = None) -> Listing:
    """Every item under its final key, written to out as lines, if that is given."""
    digest, keys, starts = hashlib.blake2b(digest_size=16), Keys(), [0]
    for item in source.items():
        item = dataclasses.replace(item, key=keys.take(item.key))
        values = [getattr(item, part.name) for part in dataclasses.fields(Item)]
        line = json.dumps(values, default=str).encode() + b"\n"
        digest.update(line)
        starts.append(starts[-1] + len(line))
        if out is not None:
            out.write(line)
    renamed = tuple(keys.renamed)
    return Listing(len(starts) - 1, digest.hexdigest(), np.array(starts, np.int64), renamed)


def read_items(path: Path, start: int, number: int) -> Iterator[Item]:
    """The items from the line that begins at byte start on."""
    with path.open("rb") as file:
        file.seek(start)
        for _ in range(number):
            key, where, captions, meta, at = json.loads(file.readline())
            yield Item(key, where, tuple(captions), meta, at)


class Keys:
    """Names that a tar member may have, each given once."""

    def __init__(self) -> None:
        self._given: set[str] = set()
        self.renamed: list[str] = []

    def take(self, raw: str) -> str:
        """The name itself where it is one and new; odd letters become _, a repeat gets a number."""
        # Readers cut a name at its first dot, and take one that begins with __ for their own.
        clean = re.sub(r"[^A-Za-z0-9_=+-]", "_", raw)[-LONGEST_KEY:].lstrip("_") or "sample"
        key = clean
        if key in self._given:
            key = next(k for i in count(2) if (k := f"{clean}-{i}") not in self._given)
            self.renamed.append(key)
        self._given.add(key)
        return key
