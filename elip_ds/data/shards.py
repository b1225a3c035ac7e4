"""Tar shards in the WebDataset layout: write them, find them, index them, read one sample of them.

A sample is the tar members that share a name up to its first dot: KEY.jpg (or png, webp), KEY.txt
(one caption) and KEY.json (everything else; `captions` holds all captions). Our writer adds an
index.json to the folder, so that counting samples opens no shard. Shards without one are scanned.
"""

import contextlib
import glob
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import webdataset
from webdataset.tariterators import base_plus_ext

from elip_ds.data.record import Record
from elip_ds.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
INDEX = "index.json"


class BadSample(ValueError):
    """A sample that cannot be used; the message is the reason, a few words."""


def write_shards(
    records: Iterable[Record], folder: Path, prefix: str, per_shard: int = 1000
) -> list[Path]:
    """Write PREFIX-000000.tar, ... and add them to the folder's index. Returns the shards' paths.

    Each shard is written under another name and renamed when it is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    counts: dict[str, dict[str, int]] = {}
    iterator = iter(records)
    record = next(iterator, None)
    while record is not None:
        path = folder / f"{prefix}-{len(paths):06d}.tar"
        partial = path.with_suffix(".tar.partial")
        count = 0
        with webdataset.TarWriter(str(partial), encoder=False, mtime=0) as tar:
            while record is not None and count < per_shard:
                tar.write(_members(record))
                count += 1
                record = next(iterator, None)
        os.replace(partial, path)
        paths.append(path)
        counts[path.name] = {"samples": count, "bytes": path.stat().st_size}
    index = folder / INDEX
    known = json.loads(index.read_text()) if index.exists() else {}
    partial = folder / f"{INDEX}.partial"
    partial.write_text(json.dumps(known | counts, indent=1) + "\n")
    os.replace(partial, index)
    return paths


def _members(record: Record) -> dict[str, str | bytes]:
    meta = {**record.meta, "captions": list(record.captions)}
    return {
        "__key__": record.key,
        record.extension: record.image,
        "txt": record.captions[0].encode(),
        "json": json.dumps(meta, sort_keys=True, ensure_ascii=False).encode(),
    }


def expand_shards(pattern: str, key: str) -> list[Path]:
    """Brace pattern or glob -> existing shards in order. Raises UserError naming what is missing."""
    found: list[Path] = []
    for name in webdataset.shardlists.expand_urls(pattern):
        matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not matches:
            raise UserError(f"{key}: no file matches {name}")
        found += [Path(match) for match in matches]
    missing = [path for path in found if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{key}: shard {missing[0]}{more} does not exist")
    return found


def count_samples(shards: list[Path], key: str) -> list[int]:
    """Samples in each shard, from the folder's index where it fits the file, else by a scan."""
    indexes: dict[Path, dict] = {}
    counts = []
    for path in shards:
        index = indexes.setdefault(path.parent, _read_index(path.parent))
        entry = index.get(path.name, {})
        known = entry.get("bytes") == path.stat().st_size
        counts.append(entry["samples"] if known else len(scan_shard(path, key)))
    if sum(counts) == 0:
        raise UserError(f"{key}: the {len(shards)} shards hold no sample")
    return counts


def _read_index(folder: Path) -> dict:
    with contextlib.suppress(OSError, json.JSONDecodeError):
        return json.loads((folder / INDEX).read_text())
    return {}


@dataclass(frozen=True)
class Entry:
    """key: the sample's name.  members: extension -> (offset, size) in the tar."""

    key: str
    members: dict[str, tuple[int, int]]


def scan_shard(path: Path, key: str = "data") -> list[Entry]:
    """The samples of a shard in file order, by reading its headers. Raises UserError if it is no tar."""
    entries: list[Entry] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name, extension = base_plus_ext(member.name)
                if not member.isfile() or name is None or name.startswith("__"):
                    continue
                if not entries or entries[-1].key != name:
                    entries.append(Entry(name, {}))
                entries[-1].members[extension.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{key}: shard {path} cannot be read: {error}") from None
    return entries


class ShardReader:
    """Reads single samples of one shard; the headers are scanned at the first read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries = scan_shard(path)
        self._file = path.open("rb", buffering=0)

    def close(self) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._entries)

    def key(self, i: int) -> str:
        return self._entries[i].key

    def read(self, i: int) -> Record:
        """Sample i. Raises BadSample when the image or every caption is missing."""
        entry = self._entries[i]
        extension = next((e for e in IMAGE_EXTENSIONS if e in entry.members), None)
        if extension is None:
            raise BadSample("no image")
        meta = {}
        if "json" in entry.members:
            with contextlib.suppress(json.JSONDecodeError):
                meta = json.loads(self._bytes(entry, "json"))
        captions = [c for c in meta.get("captions") or [] if isinstance(c, str) and c.strip()]
        if not captions and "txt" in entry.members:
            text = self._bytes(entry, "txt").decode("utf-8", errors="replace").strip()
            captions = [text] if text else []
        if not captions:
            raise BadSample("no caption")
        image = self._bytes(entry, extension)
        return Record(entry.key, image, extension, tuple(captions), meta)

    def _bytes(self, entry: Entry, extension: str) -> bytes:
        offset, size = entry.members[extension]
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) != size:
            raise BadSample("shard is truncated")
        return data
