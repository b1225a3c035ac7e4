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


def scan_once(path: Path, folder: Path) -> Scan:
    """As scan_shard, from a note in the folder where another process has left one.

    The note is of this file at this size and time; one that cannot be kept or read is done without.
    """
    try:
        status = path.stat()
    except OSError:
        return scan_shard(path)  # which says what is the matter
    state = f"{path.absolute()} {status.st_size} {status.st_mtime_ns}"
    note = folder / f"{hashlib.blake2b(state.encode(), digest_size=16).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        whole, entries = json.loads(note.read_bytes())
        return Scan([Entry(key, _members(members)) for key, members in entries], whole)
    scan = scan_shard(path)
    partial = note.with_name(f".{note.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps([scan.whole, [[e.key, e.members] for e in scan.entries]]))
        os.replace(partial, note)
    return scan


def _members(members: dict[str, list[int]]) -> dict[str, tuple[int, int]]:
    return {extension: (offset, size) for extension, (offset, size) in members.items()}
