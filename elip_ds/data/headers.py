"""Where the samples of a shard lie, found out once per node.

Ranks and their workers all read a few samples of every shard: each would scan all of its headers,
which at many workers takes longer than decoding what they want.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from elip_ds.data.shards import Entry, Scan, scan_shard

MOST_BYTES = 2**30
"Of the notes, as often as one looks; a shard of 1000 samples has one of about 100 kB."

LOOKS = "00"
"One note in 256, by its name, looks at what all take: at every one that would be most of the work."


def scan_once(path: Path, folder: Path) -> Scan:
    """As scan_shard, from a note in the folder where another process has left one.

    A file has one note, which holds for its size and time; one that cannot be kept or read is done
    without.
    """
    try:
        status = path.stat()
    except OSError:
        return scan_shard(path)  # which says what is the matter
    state = [status.st_size, status.st_mtime_ns]
    name = hashlib.blake2b(os.fsencode(path.absolute()), digest_size=16).hexdigest()
    note = folder / f"{name}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        noted, whole, entries = json.loads(note.read_bytes())
        if noted == state:
            return Scan([Entry(key, _members(members)) for key, members in entries], whole)
    scan = scan_shard(path)
    partial = note.with_name(f".{note.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        entries = [[e.key, e.members] for e in scan.entries]
        partial.write_text(json.dumps([state, scan.whole, entries]))
        os.replace(partial, note)
        if name.startswith(LOOKS):
            _make_room(folder)
    return scan


def _make_room(folder: Path) -> None:
    """Delete the oldest notes, half of all, when they take too much."""
    notes = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process makes room, too
            status = path.stat()
            notes.append((status.st_mtime_ns, status.st_size, path))
    notes.sort()
    total = sum(size for _, size, _ in notes)
    if total > MOST_BYTES:
        for _, size, path in notes:
            if total <= MOST_BYTES // 2:
                break
            path.unlink(missing_ok=True)
            total -= size


def _members(members: dict[str, list[int]]) -> dict[str, tuple[int, int]]:
    return {extension: (offset, size) for extension, (offset, size) in members.items()}
