"""One shard, whole or not at all, and what is to be said of it."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import webdataset

from elip_ds import registry
from elip_ds.data.making.listing import read_items
from elip_ds.data.making.resize import store_image
from elip_ds.data.raw import Item, RawSource
from elip_ds.data.record import BadSample, Record
from elip_ds.data.shards import tar_members
from elip_ds.errors import UserError

MIN_TRIED = 100
"Samples of a shard before the share of bad ones may stop the job."
DUPLICATE = "duplicate"


@dataclass(frozen=True)
class Job:
    """kind, config: a raw source of the registry and its Config.  folder: where shards go.

    per_shard: listed samples for each shard.  short_side: pixels; longer ones become that, None
    leaves them.  quality: of JPEGs that are encoded anew.  check: decode every image.
    dedup: of images with the same bytes only the first in order stays.
    max_bad_share: of a shard; more than that stops the job.
    """

    kind: str
    config: Any
    folder: Path
    prefix: str
    per_shard: int = 1000
    short_side: int | None = None
    quality: int = 90
    check: bool = True
    dedup: bool = False
    max_bad_share: float = 0.9

    def open_source(self) -> RawSource:
        return registry.resolve(registry.SOURCES, self.kind, "kind")(self.config)

    @property
    def state(self) -> Path:
        """Folder of what is known of the job; shards that are under way are here, too."""
        return self.folder / f".{self.prefix}.making"

    @property
    def listing(self) -> Path:
        return self.state / "listing.jsonl"

    def shard(self, number: int) -> Path:
        return self.folder / f"{self.prefix}-{number:06d}.tar"

    def report(self, number: int) -> Path:
        """What is said of a shard: {"entry": for the index or null, "skipped": [...]}."""
        return self.state / f"{number:06d}.json"


@dataclass(frozen=True)
class Task:
    """A shard to make: samples of the listing, the first at byte start of it.

    duplicates: place in the shard -> key of the sample with the same image.
    """

    number: int
    samples: range
    start: int
    duplicates: dict[int, str] = field(default_factory=dict)


class Reader:
    """Has the raw data of one job, opened when first wanted; each worker process has its own."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @cached_property
    def source(self) -> RawSource:
        return self.job.open_source()


class ShardMaker(Reader):
    """Makes shards of one job."""

    def __call__(self, task: Task, advance: Callable[[int], None]) -> int:
        """Number of the shard. Raises UserError when it cannot be written, or is mostly bad."""
        # A worker of a start that was killed may be at it for one more sample.
        partial = self.job.state / f"{task.number:06d}.{os.getpid()}.partial"
        try:
            statistics, skipped = self._write(partial, task, advance)
            _check_bad(skipped, task, self.job)
            entry = None
            if statistics.samples:
                entry = statistics.entry | {
                    "bytes": partial.stat().st_size,
                    "checksum": checksum(partial),
                }
            report = {"entry": entry, "skipped": skipped}
            advance(0)  # an orphan ends here and publishes nothing
            write_whole(self.job.report(task.number), json.dumps(report).encode())
            if entry is None:
                partial.unlink()
            else:
                os.replace(partial, self.job.shard(task.number))
                sync_folder(self.job.folder)
        except OSError as error:  # what a source cannot read is a BadSample
            partial.unlink(missing_ok=True)
            raise UserError(f"--out {self.job.folder}: {error.strerror or error}") from None
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return task.number

    def _write(
        self, partial: Path, task: Task, advance: Callable[[int], None]
    ) -> tuple["Statistics", list[dict[str, Any]]]:
        statistics, skipped = Statistics(), []
        items = read_items(self.job.listing, task.start, len(task.samples))
        with partial.open("wb") as file:
            with webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
                for place, item in enumerate(items):
                    try:
                        if place in task.duplicates:
                            raise BadSample(f"{DUPLICATE}: of {task.duplicates[place]}")
                        record = self._record(item)
                    except BadSample as error:
                        line = {"key": item.key, "reason": str(error), "where": _where(item)}
                        skipped.append({"shard": self.job.shard(task.number).name} | line)
                    else:
                        tar.write(tar_members(record))
                        statistics.add(record)
                    advance(1)
            file.flush()
            os.fsync(file.fileno())
        return statistics, skipped

    def _record(self, item: Item) -> Record:
        record = with_captions(self.source.read(item))
        stored = store_image(
            record.image, self.job.short_side, self.job.quality, check=self.job.check
        )
        meta = record.meta | {"width": stored.size[0], "height": stored.size[1]}
        if stored.size != stored.original_size:
            meta["original_size"] = list(stored.original_size)
        return replace(
            record, key=item.key, image=stored.data, extension=stored.extension, meta=meta
        )


class Statistics:
    """Sums over the samples of a shard."""

    def __init__(self) -> None:
        self.samples = 0
        self._sums: Counter[str] = Counter()

    def add(self, record: Record) -> None:
        self.samples += 1
        self._sums["captions"] += len(record.captions)
        self._sums["words"] += sum(len(caption.split()) for caption in record.captions)
        for name in ("width", "height"):
            self._sums[name] += record.meta[name]

    @property
    def entry(self) -> dict[str, Any]:
        """For the index. mean_width, mean_height: pixels."""
        sums = self._sums
        return {
            "samples": self.samples,
            "captions": sums["captions"],
            "mean_width": round(sums["width"] / self.samples, 2),
            "mean_height": round(sums["height"] / self.samples, 2),
            "mean_caption_words": round(sums["words"] / sums["captions"], 2),
        }


def with_captions(record: Record) -> Record:
    """Without white space around captions, and without empty ones. Raises BadSample for none."""
    # JSON can spell half a surrogate pair, which has no bytes.
    texts = [text.encode(errors="replace").decode().strip() for text in record.captions]
    captions = tuple(text for text in texts if text)
    if not captions:
        raise BadSample("no caption")
    return replace(record, captions=captions)


def reason_of(line: dict[str, Any]) -> str:
    """A skipped sample's reason without what is particular to it, to count by."""
    return line["reason"].partition(":")[0]


def _check_bad(skipped: list[dict[str, Any]], task: Task, job: Job) -> None:
    """Raises UserError if the shard says more of its raw files' place than of their dirt."""
    bad = [line for line in skipped if reason_of(line) != DUPLICATE]
    tried = len(task.samples) - (len(skipped) - len(bad))
    if tried >= MIN_TRIED and len(bad) > job.max_bad_share * tried:
        raise UserError(
            f"{job.shard(task.number).name}: {len(bad)} of {tried} samples cannot be used, the "
            f"first, {bad[0]['where']}: {bad[0]['reason']}; if that is as it should be, "
            "--max-bad-share 1"
        )


def _where(item: Item) -> str:
    return item.where if item.at is None else f"{item.where} [{item.at}]"


def checksum(path: Path) -> str:
    """'blake2b:' and 32 hex digits, of a whole file."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return f"blake2b:{digest.hexdigest()}"


def write_whole(path: Path, data: bytes) -> None:
    """On disk whole, or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """So that a rename outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
