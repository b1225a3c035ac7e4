"""Shards looked at: are they whole, and what is in them."""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from elip_ds.data.decode import decode_image
from elip_ds.data.making.crew import run_tasks
from elip_ds.data.making.one_shard import checksum
from elip_ds.data.record import BadSample, BadShard, Record
from elip_ds.data.shards import INDEX, ShardReader, read_index

DIGEST_BYTES = 16
MOST_PROBLEMS = 20
"Lines about one shard; a broken one has thousands."


@dataclass
class Contents:
    """Of one shard or many. Each counter says how many images or captions have the value.

    short_sides, long_sides: pixels.  aspects: width / height, rounded to tenths.
    words: of a caption.  images, keys: (N, DIGEST_BYTES) hashes.  problems: one line each.
    """

    samples: int = 0
    bytes: int = 0
    short_sides: Counter[int] = field(default_factory=Counter)
    long_sides: Counter[int] = field(default_factory=Counter)
    aspects: Counter[float] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    captions_per_image: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    images: np.ndarray = field(default_factory=lambda: np.zeros((0, DIGEST_BYTES), np.uint8))
    keys: np.ndarray = field(default_factory=lambda: np.zeros((0, DIGEST_BYTES), np.uint8))
    problems: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Sequence["Contents"]) -> "Contents":
        """All together."""
        whole = cls()
        for part in parts:
            whole.samples += part.samples
            whole.bytes += part.bytes
            whole.problems += part.problems
            for name, value in vars(whole).items():
                if isinstance(value, Counter):
                    value.update(getattr(part, name))
        if parts:
            whole.images = np.concatenate([part.images for part in parts])
            whole.keys = np.concatenate([part.keys for part in parts])
        return whole

    @property
    def repeated_images(self) -> int:
        """Images whose very bytes an earlier one has."""
        return _repeats(self.images)

    @property
    def repeated_keys(self) -> int:
        return _repeats(self.keys)


class Inspector:
    """Looks at one shard. decode: every image in full, not only its header."""

    def __init__(self, decode: bool = False) -> None:
        self.decode = decode

    def __call__(self, path: Path, advance: Callable[[int], None]) -> Contents:
        found = Contents(bytes=path.stat().st_size)
        entry = read_index(path.parent).get(path.name)
        self._check_file(path, entry, found)
        try:
            reader = ShardReader(path)
        except BadShard as error:
            found.problems.append(f"{path} is damaged or no tar: {error}")
            return found
        if not reader.whole:
            found.problems.append(f"{path} ends too early, after {len(reader)} whole samples")
        if isinstance(entry, dict) and entry.get("samples", len(reader)) != len(reader):
            found.problems.append(
                f"{path} holds {len(reader)} samples, {INDEX} says {entry['samples']}"
            )
        images, keys = [], []
        for i in range(len(reader)):
            keys.append(_digest(reader.key(i).encode(errors="replace")))
            try:
                record = reader.read(i)
                self._count(record, found)
                images.append(_digest(record.image))
            except BadSample as error:
                found.problems.append(f"{path}: sample {reader.key(i)}: {error}")
            advance(1)
        reader.close()
        found.samples = len(reader)
        found.images, found.keys = _rows(images), _rows(keys)
        if len(found.problems) > MOST_PROBLEMS:
            more = len(found.problems) - MOST_PROBLEMS
            found.problems[MOST_PROBLEMS:] = [f"{path}: and {more} more like these"]
        return found

    def _check_file(self, path: Path, entry: Any, found: Contents) -> None:
        if not isinstance(entry, dict) or "checksum" not in entry:
            return
        if entry.get("bytes") != found.bytes:
            said = entry.get("bytes")
            found.problems.append(f"{path} has {found.bytes} bytes, {INDEX} says {said}")
        elif checksum(path) != entry["checksum"]:
            found.problems.append(f"{path} is not what was written: its checksum differs")

    def _count(self, record: Record, found: Contents) -> None:
        if self.decode:
            decode_image(record.image)
        try:
            with Image.open(io.BytesIO(record.image)) as image:
                (width, height), kind = image.size, image.format
        except Exception as error:  # as many kinds as there are broken files
            raise BadSample(f"its image has no readable header: {error}") from None
        found.short_sides[min(width, height)] += 1
        found.long_sides[max(width, height)] += 1
        found.aspects[round(width / height, 1)] += 1
        found.formats[kind or "?"] += 1
        found.captions_per_image[len(record.captions)] += 1
        found.words.update(len(caption.split()) for caption in record.captions)


def inspect_shards(
    paths: list[Path],
    *,
    decode: bool = False,
    workers: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> Contents:
    """All shards together; problems of one shard come together, repeated keys and shards that an
    index names but that are gone at the end.
    """
    parts = list(run_tasks(Inspector(decode), paths, workers, advance))
    contents = Contents.of(sorted(parts, key=lambda part: part.problems))
    if contents.repeated_keys:
        contents.problems.append(f"{contents.repeated_keys} keys come twice or more")
    contents.problems += _gone(paths)
    return contents


def _gone(paths: list[Path]) -> list[str]:
    """Shards of the same series that the folder's index names and that do not exist."""
    names: dict[Path, set[str]] = {}
    for path in paths:
        names.setdefault(path.parent, set()).add(_series(path.name))
    return [
        f"{folder / name} is in {INDEX} and does not exist"
        for folder, series in names.items()
        for name in read_index(folder)
        if _series(name) in series and not (folder / name).exists()
    ]


def _series(name: str) -> str:
    return re.sub(r"\d+\.tar$", "", name)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def _rows(digests: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)


def _repeats(rows: np.ndarray) -> int:
    return len(rows) - len(np.unique(rows, axis=0))


def quantile(counts: Counter[Any], share: float) -> Any:
    """The value that this share of the counted lies at or below, None where nothing is counted."""
    reached = 0
    for value in sorted(counts):
        reached += counts[value]
        if reached >= share * counts.total():
            return value
    return None


def mean(counts: Counter[Any]) -> float:
    return sum(value * count for value, count in counts.items()) / max(counts.total(), 1)
