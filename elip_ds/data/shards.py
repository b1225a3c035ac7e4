"""Tar shards in the WebDataset layout: write them, find them, index them, read one sample of them.

A sample is the tar members that share a name up to its first dot: KEY.jpg (or png, webp), KEY.txt
(one caption) and KEY.json (everything else; `captions`, where it is there, holds all captions, and
the text is not one if it does not). Our writer adds an index.json to the folder, so that counting
samples opens no shard. Shards without one are scanned.
"""

import contextlib
import glob
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import webdataset
from webdataset.tariterators import base_plus_ext

from elip_ds.data.record import BadSample, Record
from elip_ds.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
INDEX = "index.json"


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
                tar.write(tar_members(record))
                count += 1
                record = next(iterator, None)
        os.replace(partial, path)
        paths.append(path)
        counts[path.name] = {"samples": count, "bytes": path.stat().st_size}
    partial = folder / f"{INDEX}.partial"
    partial.write_text(json.dumps(read_index(folder) | counts, indent=1) + "\n")
    os.replace(partial, folder / INDEX)
    return paths


def tar_members(record: Record) -> dict[str, str | bytes]:
    """A record as webdataset.TarWriter takes it."""
    assert record.key and "." not in record.key, record.key
    assert record.captions, record.key
    meta = {**record.meta, "captions": list(record.captions)}
    return {
        "__key__": record.key,
        record.extension: record.image,
        "txt": record.captions[0].encode(),
        "json": json.dumps(meta, sort_keys=True, ensure_ascii=False).encode(),
    }


def expand_shards(pattern: str, key: str) -> list[Path]:
    """Brace pattern or glob -> shards in order. Raises UserError naming what is missing."""
    try:
        names = webdataset.shardlists.expand_urls(pattern)
    except ValueError as error:
        raise UserError(f"{key}={pattern}: the braces do not fit: {error}") from None
    found: list[Path] = []
    for name in map(os.path.expanduser, names):
        is_glob = glob.has_magic(name) and not os.path.exists(name)
        matches = sorted(glob.glob(name)) if is_glob else [name]
        if not matches:
            raise UserError(f"{key}: no file matches {name}")
        found += [Path(match) for match in matches]
    missing = [path for path in found if not path.is_file()]
    if missing and missing[0].is_dir():
        raise UserError(f"{key}: {missing[0]} is a folder; name its shards, {missing[0]}/*.tar")
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{key}: shard {missing[0]}{more} does not exist")
    return found


def count_samples(shards: list[Path], key: str) -> list[int]:
    """Samples in each shard, from the folder's index where it fits the file, else by a scan.

    Raises UserError for a shard that holds none.
    """
    indexes: dict[Path, dict[str, Any]] = {}
    counts = []
    for path in shards:
        if path.parent not in indexes:
            indexes[path.parent] = read_index(path.parent)
        match indexes[path.parent].get(path.name):
            case {"samples": int(count), "bytes": size} if size == path.stat().st_size:
                counts.append(count)
            case _:
                counts.append(len(scan_shard(path, key)))
        if counts[-1] < 1:
            raise UserError(f"{key}: shard {path} holds no sample")
    return counts


def read_index(folder: Path) -> dict[str, Any]:
    """The folder's index, empty where there is none to use."""
    with contextlib.suppress(OSError, ValueError):
        index = json.loads((folder / INDEX).read_text())
        return index if isinstance(index, dict) else {}
    return {}


@dataclass(frozen=True)
class Entry:
    """key: the sample's name.  members: extension -> (offset, size) in the tar."""

    key: str
    members: dict[str, tuple[int, int]]


def scan_shard(path: Path, key: str = "data") -> list[Entry]:
    """The samples of a shard in file order, by reading its headers.

    Raises UserError if it is no tar, or does not end as one.
    """
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
            end = tar.offset
        with path.open("rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                # For tarfile a file that stops between members or at a broken header has ended.
                raise tarfile.ReadError(f"the end mark of a tar is missing at byte {end}")
    except (tarfile.TarError, OSError, ValueError, LookupError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key}: shard {path} is damaged or no tar: {reason}") from None
    return entries


class ShardReader:
    """Reads single samples of one shard, whose headers are scanned at once."""

    def __init__(self, path: Path) -> None:
        """Raises UserError as scan_shard does."""
        self.path, self._file = path, -1
        self._entries = scan_shard(path)
        self._file = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    __del__ = close

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
        meta = self._meta(entry)
        captions = self._captions(entry, meta)
        meta.pop("captions", None)
        return Record(entry.key, self._bytes(entry, extension), extension, captions, meta)

    def captions(self, i: int) -> tuple[str, ...]:
        """The captions of sample i, without a look at its image. Raises BadSample for none."""
        entry = self._entries[i]
        return self._captions(entry, self._meta(entry))

    def _meta(self, entry: Entry) -> dict[str, Any]:
        if "json" not in entry.members:
            return {}
        data = self._bytes(entry, "json")
        try:
            meta = json.loads(data)
        except (ValueError, RecursionError):
            raise BadSample("its json is broken") from None
        return meta if isinstance(meta, dict) else {}

    def _captions(self, entry: Entry, meta: dict[str, Any]) -> tuple[str, ...]:
        captions = meta.get("captions")
        if captions is None and "txt" in entry.members:
            captions = self._bytes(entry, "txt").decode("utf-8", errors="replace").strip()
        listed = captions if isinstance(captions, list) else [captions]
        # JSON can spell half a surrogate pair, which no tokenizer takes.
        texts = [c.encode(errors="replace").decode() for c in listed if isinstance(c, str)]
        usable = tuple(text for text in texts if text.strip())
        if not usable:
            raise BadSample("no caption")
        return usable

    def _bytes(self, entry: Entry, extension: str) -> bytes:
        offset, size = entry.members[extension]
        try:
            data = os.pread(self._file, size, offset)
        except OSError as error:
            raise BadSample(f"cannot be read: {error.strerror}") from None
        if len(data) != size:
            raise BadSample("its shard has become shorter")
        return data
