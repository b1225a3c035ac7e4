"""Answers of earlier probes, kept by a fingerprint of all that they depend on.

A convenience: whatever is wrong with the folder costs a probe, never a run.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)

SCHEMA = 2
"Of an entry; one with another number was written by other code and is no answer."


def default_folder() -> Path:
    """elip_ds/plans in $XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "elip_ds" / "plans"


def fingerprint(facts: Mapping[str, object]) -> str:
    """64 hex digits, the same for the same facts in any order.

    facts: what JSON can hold; anything else is a TypeError, for its repr may not last.
    """
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


class Cache:
    """One JSON file for each key, a fingerprint, in folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._warned = False

    def read(self, key: str) -> dict | None:
        """The answer; None: never given, forgotten, written by other code, or unreadable."""
        try:
            entry = json.loads(self._path(key).read_bytes())
            return entry["answer"] if entry["schema"] == SCHEMA else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._warn("cannot be read", error)
            return None

    def write(self, key: str, answer: dict) -> None:
        path = self._path(key)
        partial = path.with_name(f".{key}.{os.getpid()}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_text(json.dumps({"schema": SCHEMA, "answer": answer}, indent=1))
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            self._warn("cannot be written", error)

    def forget(self, key: str) -> None:
        """The answer turned out wrong: next time it is measured again."""
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            self._warn("cannot be written", error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _warn(self, what: str, error: Exception) -> None:
        if not self._warned:
            log.warning("the cache of plans in %s %s: %r", self.folder, what, error)
        self._warned = True
