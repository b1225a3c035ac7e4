"""Shards that are not files of this machine: copied into a folder of limited size, once per node.

A name with :// is opened by fsspec (s3, gs, http, ...), and `pipe:COMMAND` is what the command
writes. A copy has its name when it is whole; the least recently used ones make room for it.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import logging
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from elip_ds.config.schema import CacheConfig
from elip_ds.data.patience import Patience
from elip_ds.data.record import BadShard
from elip_ds.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

CHUNK_BYTES = 1 << 20
FIRST_PAUSE_SECONDS = 0.5
"Before the first further try; each pause is twice the one before."
LOST_COPIES = 5
"Times that a copy may make room for others before it was opened."
KILLED_SECONDS = 5.0
"In which a killed command ends; one that waits for a dead disk does not."


def is_remote(name: str) -> bool:
    """It is not the name of a local file."""
    return name.startswith("pipe:") or "://" in name


def glob_remote(name: str, key: str) -> list[str]:
    """What a remote name with wildcards stands for; itself if it has none. Raises UserError, also
    when it stands for nothing.
    """
    # Behind the ? of a web address is a signature, say.
    pattern = name.partition("?")[0] if name.startswith(("http://", "https://")) else name
    if name.startswith("pipe:") or not glob.has_magic(pattern):
        return [name]
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(name)
        matches = [system.unstrip_protocol(found) for found in sorted(system.glob(path))]
    except Exception as error:  # every file system has errors of its own
        raise UserError(f"{key}={name} cannot be listed: {_line(error)}") from None
    if not matches:
        raise UserError(f"{key}: no file matches {name}")
    return matches


class Fetcher:
    """patience: how long one read may take.  retries: further tries after a failure."""

    def __init__(self, config: CacheConfig, patience: Patience, retries: int) -> None:
        default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "elip_ds" / "shards"
        self.folder = (default if config.dir == "auto" else Path(config.dir)).expanduser()
        self._limit_bytes = int(config.limit_gib * 2**30)
        self.patience, self._retries = patience, retries

    def local(self, shard: Path | str) -> Path:
        """A file of this machine as it is, a remote one's copy."""
        return shard if isinstance(shard, Path) else self.fetch(shard)

    def use(self, shard: Path | str, function: Callable[[Path], T]) -> T:
        """function(local(shard)), with patience. A copy that another process deletes before it is
        open, to make room, is made again. Raises what both raise, and TimeoutError.
        """
        for left in range(LOST_COPIES, 0, -1):
            path = self.local(shard)
            try:
                return self.patience(function, path)
            except BadShard as error:
                if error.kind != "missing" or isinstance(shard, Path) or left == 1:
                    raise
        raise AssertionError("the last try returns or raises")

    def fetch(self, name: str) -> Path:
        """The copy of a remote file, made now if there is none. Another process that wants the
        same one waits. Raises BadShard when it cannot be had, UserError for the folder's faults.
        """
        path = self.folder / _file_name(name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f".{path.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    self._copy(name, path)
            # It is the most recently used; when it was made stays, by which notes of it are known.
            with contextlib.suppress(FileNotFoundError):  # another process has made room
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        except OSError as error:
            raise UserError(
                f"data.cache.dir={self.folder}: {error.strerror}; name another folder, or lower "
                "data.cache.limit_gib"
            ) from None
        return path

    def read(self, name: str) -> bytes:
        """A small file at once, not kept. Raises BadShard."""
        return b"".join(self._tried(name, lambda: list(self._chunks(name))))

    def _copy(self, name: str, path: Path) -> None:
        partial = path.with_name(f".{path.name}.partial")
        self._clear()
        try:
            # Unbuffered: of a chunk that does not fit the disk it is known how much was written.
            with partial.open("wb", buffering=0) as file:
                self._tried(name, lambda: self._write(name, file))
            self._make_room(partial.stat().st_size, self._limit_bytes)
            os.replace(partial, path)
        except _Here as error:
            raise error.cause from None
        finally:
            partial.unlink(missing_ok=True)

    def _write(self, name: str, file: FileIO) -> None:
        file.seek(0)
        file.truncate()  # of an earlier try
        for chunk in self._chunks(name):
            rest = memoryview(chunk)
            while rest:
                try:
                    rest = rest[file.write(rest) :]
                except OSError as error:
                    if error.errno != errno.ENOSPC or not self._make_room(len(rest), 0):
                        raise _Here(error) from None

    def _clear(self) -> None:
        """Delete the beginnings of copies whose makers were killed: nobody holds their locks."""
        for partial in self.folder.glob(".*.partial"):
            with contextlib.suppress(OSError), partial.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink()

    def _tried(self, name: str, action: Any) -> Any:
        for attempt in range(self._retries + 1):
            try:
                return action()
            except _Here:
                raise
            except Exception as error:  # every file system has errors of its own
                failure = error
            if attempt < self._retries:
                pause = FIRST_PAUSE_SECONDS * 2**attempt
                log.warning("%s: %s; again in %g s", name, _line(failure), pause)
                time.sleep(pause)
        slow, gone = isinstance(failure, TimeoutError), isinstance(failure, FileNotFoundError)
        kind = "slow" if slow else "missing" if gone else "unreadable"
        raise BadShard(f"{_line(failure)} ({self._retries + 1} tries)", kind) from None

    def _chunks(self, name: str) -> Iterator[bytes]:
        opened = _Pipe(name) if name.startswith("pipe:") else _Remote(name, self.patience)
        try:
            while chunk := self.patience(opened.read):
                yield chunk
            self.patience(opened.check)
        finally:
            opened.close()

    def _make_room(self, wanted: int, limit: int) -> bool:
        """Delete the least recently used copies until wanted bytes more stay within the limit.

        With a limit of 0: one of them. Says whether any went. A reader that has one open keeps it.
        """
        copies = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process makes room, too
                if path.is_file() and not path.name.startswith("."):
                    copies.append((path.stat().st_atime_ns, path.stat().st_size, path))
        copies.sort()
        total, went = sum(size for _, size, _ in copies), False
        for _, size, path in copies:
            if limit and total + wanted <= limit:
                break
            path.unlink(missing_ok=True)
            total, went = total - size, True
            if not limit:
                break
        return went


class _Here(Exception):
    """A fault of this machine's disk, which no further try of the remote one mends."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Remote:
    def __init__(self, name: str, patience: Patience) -> None:
        import fsspec

        self._patience = patience
        self._file = cast(BinaryIO, patience(lambda: fsspec.open(name, "rb").open()))

    def read(self) -> bytes:
        return self._file.read(CHUNK_BYTES)

    def check(self) -> None:
        pass

    def close(self) -> None:
        # It waits for a read that hangs; then both are left behind.
        with contextlib.suppress(Exception):
            self._patience(self._file.close)


class _Pipe:
    def __init__(self, name: str) -> None:
        # A pipe that nobody empties would stop the command.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            name.removeprefix("pipe:"),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._said,
            bufsize=0,  # a buffer cannot be closed while a read of it hangs
            start_new_session=True,  # so that all of the command can be ended
        )

    def read(self) -> bytes:
        assert self._process.stdout is not None
        return self._process.stdout.read(CHUNK_BYTES)

    def check(self) -> None:
        """Raises OSError when the command failed, also after its last byte."""
        status = self._process.wait()
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip()
        if status:
            last = f": {said.splitlines()[-1]}" if said else ""
            raise OSError(f"the command left with status {status}{last}")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILLED_SECONDS)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._said.close()


def _file_name(name: str) -> str:
    """Unlike for any other source, also one with files of the same names."""
    base = name.removeprefix("pipe:").partition("?")[0].rstrip("/ -").rpartition("/")[2]
    safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in base)[-80:]
    return f"{hashlib.blake2b(os.fsencode(name), digest_size=10).hexdigest()}-{safe}"


def _line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).strip().splitlines()[0]
