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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import webdataset
from webdataset.tariterators import base_plus_ext

from elip_ds.data.fetch import Fetcher, glob_remote, is_remote
from elip_ds.data.record import PASSING, BadSample, BadShard, Record
from elip_ds.errors import PassingError, UserError

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


Shard = Path | str
"""A file of this machine, or the name of a remote one."""


def expand_shards(pattern: str, key: str) -> list[Shard]:
    """Brace pattern or glob -> shards in order. Raises UserError naming what is missing here;
    whether a remote one is there shows when it is counted.
    """
    try:
        names = webdataset.shardlists.expand_urls(pattern)
    except ValueError as error:
        raise UserError(f"{key}={pattern}: the braces do not fit: {error}") from None
    found: list[Shard] = []
    for name in names:
        if is_remote(name):
            found += glob_remote(name, key)
            continue
        name = os.path.expanduser(name)
        is_glob = glob.has_magic(name) and not os.path.exists(name)
        matches = sorted(glob.glob(name)) if is_glob else [name]
        if not matches:
            raise UserError(f"{key}: no file matches {name}")
        found += [Path(match) for match in matches]
    missing = [path for path in found if isinstance(path, Path) and not _is_shard(path)]
    if missing and os.path.isdir(missing[0]):
        raise UserError(f"{key}: {missing[0]} is a folder; name its shards, {missing[0]}/*.tar")
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{key}: shard {missing[0]}{more} does not exist")
    return found


def expand_files(pattern: str, key: str) -> list[Path]:
    """As expand_shards, of files of this machine alone."""
    found = expand_shards(pattern, key)
    remote = [shard for shard in found if not isinstance(shard, Path)]
    if remote:
        raise UserError(f"{key}: {remote[0]} is not a file of this machine; copy it here first")
    return [shard for shard in found if isinstance(shard, Path)]


def _is_shard(path: Path) -> bool:
    return os.path.exists(path) and not os.path.isdir(path)  # a Path raises for too long a name


class Counted(NamedTuple):
    """samples: in each shard.  cut: shards that end too early; what is missing is counted where an
    index tells of it.
    """

    samples: list[int]
    cut: list[Shard]


def count_samples(
    shards: Sequence[Shard], key: str, fetcher: Fetcher, index: str | None = None
) -> Counted:
    """Samples in each shard, from an index where it fits the file, else by a scan.

    index: the name of the index of remote shards, if it is not index.json beside them.
    Raises UserError for a shard that holds none, or cannot be had.
    """
    indexes: dict[str, dict[str, Any]] = {}
    counted = Counted([], [])
    for shard in shards:
        folder = os.path.dirname(str(shard))
        if folder not in indexes:
            indexes[folder] = (
                _read_local_index(Path(folder), key, fetcher)
                if isinstance(shard, Path)
                else _read_remote_index(folder, index, fetcher)
            )
        entry = indexes[folder].get(_file_name(shard))
        count, cut = _count(shard, entry, key, fetcher)
        if count < 1:
            raise UserError(f"{key}: shard {shard} holds no sample")
        counted.samples.append(count)
        if cut:
            counted.cut.append(shard)
    return counted


def _count(shard: Shard, entry: Any, key: str, fetcher: Fetcher) -> tuple[int, bool]:
    match entry:
        case {"samples": int(count)} if isinstance(shard, str):
            return count, False  # what is there now shows when it is read
        case {"samples": int(count), "bytes": int(size)} if isinstance(shard, Path):
            with contextlib.suppress(OSError):  # what is the matter the scan says
                there = fetcher.patience(os.path.getsize, shard)
                if size >= there:
                    return count, size > there
    try:
        scan = fetcher.use(shard, scan_shard)
    except BadShard as error:
        if error.kind in PASSING:
            raise PassingError(f"{key}: shard {shard} cannot be read: {error}") from None
        raise UserError(f"{key}: shard {shard} is damaged or no tar: {error}") from None
    except TimeoutError as error:
        raise PassingError(
            f"{key}: shard {shard} cannot be read: {error} (data.time_limit_seconds)"
        ) from None
    return len(scan.entries), not scan.whole


def _file_name(shard: Shard) -> str:
    """As an index has it."""
    words = str(shard).partition("?")[0].split()
    return os.path.basename(next((w for w in words if w.endswith(".tar")), words[-1]))


def _read_local_index(folder: Path, key: str, fetcher: Fetcher) -> dict[str, Any]:
    try:
        return fetcher.patience(read_index, folder)
    except TimeoutError as error:
        raise PassingError(
            f"{key}: {folder / INDEX} cannot be read: {error} (data.time_limit_seconds)"
        ) from None


def _read_remote_index(folder: str, name: str | None, fetcher: Fetcher) -> dict[str, Any]:
    if name is None and folder.startswith("pipe:"):
        return {}
    with contextlib.suppress(BadShard, ValueError, RecursionError):
        index = json.loads(fetcher.read(name or f"{folder}/{INDEX}"))
        return index if isinstance(index, dict) else {}
    return {}


def read_index(folder: Path) -> dict[str, Any]:
    """The folder's index, empty where there is none to use."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        index = json.loads((folder / INDEX).read_text())
        return index if isinstance(index, dict) else {}
    return {}


@dataclass(frozen=True)
class Entry:
    """key: the sample's name.  members: extension -> (offset, size) in the tar."""

    key: str
    members: dict[str, tuple[int, int]]


class Scan(NamedTuple):
    """whole: the tar ends as one; else the last entry, which may lack members, is left out."""

    entries: list[Entry]
    whole: bool


def scan_shard(path: Path) -> Scan:
    """The samples of a shard in file order, by reading its headers.

    Raises BadShard if it is gone, cannot be read, or is no tar at all.
    """
    entries: list[Entry] = []
    whole = True
    try:
        with tarfile.open(path, "r:") as tar:
            try:
                for member in tar:
                    name, extension = base_plus_ext(member.name)
                    if not member.isfile() or name is None or name.startswith("__"):
                        continue
                    if not entries or entries[-1].key != name:
                        entries.append(Entry(name, {}))
                    entries[-1].members[extension.lower()] = (member.offset_data, member.size)
            except (tarfile.TarError, ValueError, LookupError, OverflowError):
                whole = False
            end = tar.offset
        with path.open("rb") as file:
            file.seek(end)
            # For tarfile a file that stops between members or at a broken header has ended.
            whole = whole and file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except FileNotFoundError as error:
        raise BadShard(error.strerror or "it is gone", "missing") from None
    except OSError as error:
        raise BadShard(error.strerror or str(error), "unreadable") from None
    except (tarfile.TarError, ValueError, LookupError, OverflowError) as error:
        raise BadShard(str(error), "truncated") from None
    if not whole and len(entries) < 2:
        raise BadShard("not one sample of it is whole", "truncated")
    return Scan(entries if whole else entries[:-1], whole)


class ShardReader:
    """Reads single samples of one shard."""

    def __init__(self, path: Path, scan: Callable[[Path], Scan] = scan_shard) -> None:
        """Raises BadShard as scan_shard does."""
        self.path, self._file = path, -1
        self._entries, self.whole = scan(path)
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise BadShard(error.strerror or str(error), "missing") from None

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    __del__ = close

    def __len__(self) -> int:
        return len(self._entries)

    def key(self, i: int) -> str:
        """Empty for a sample that the shard has lost."""
        return self._entries[i].key if i < len(self._entries) else ""

    def read(self, i: int) -> Record:
        """Sample i. Raises BadSample when the image or every caption is missing, or the shard's end
        with it.
        """
        if i >= len(self._entries):
            raise BadSample("its shard ends before it", "truncated")
        entry = self._entries[i]
        extension = next((e for e in IMAGE_EXTENSIONS if e in entry.members), None)
        if extension is None:
            raise BadSample("no image", "image")
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
            raise BadSample("its json is broken", "json") from None
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
            raise BadSample("no caption", "caption")
        return usable

    def _bytes(self, entry: Entry, extension: str) -> bytes:
        offset, size = entry.members[extension]
        try:
            data = os.pread(self._file, size, offset)
        except OSError as error:
            raise BadSample(f"cannot be read: {error.strerror}", "unreadable") from None
        if len(data) != size:
            raise BadSample("its shard has become shorter", "truncated")
        return data
