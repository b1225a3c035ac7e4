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

SCHEMA = 1
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
        return self._entry(key)["answer"]

    def write(self, key: str, answer: dict) -> None:
        """What was held against an earlier answer stays."""
        self._store(key, answer, self.violations(key))

    def forget(self, key: str, reason: str) -> None:
        """The answer turned out wrong, for that reason: next time it is measured again."""
        self._store(key, None, [*self.violations(key), reason])

    def violations(self, key: str) -> list[str]:
        """Reasons that answers to this key were forgotten for, the latest last."""
        return self._entry(key)["violations"]

    def _entry(self, key: str) -> dict:
        nothing: dict = {"answer": None, "violations": []}
        try:
            entry = json.loads(self._path(key).read_bytes())
            if entry["schema"] != SCHEMA:
                return nothing
            return {"answer": entry["answer"], "violations": list(entry["violations"])}
        except FileNotFoundError:
            return nothing
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._warn("cannot be read", error)
            return nothing

    def _store(self, key: str, answer: dict | None, violations: list[str]) -> None:
        entry = {"schema": SCHEMA, "answer": answer, "violations": violations}
        path = self._path(key)
        partial = path.with_name(f".{key}.{os.getpid()}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_text(json.dumps(entry, indent=1))
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            self._warn("cannot be written", error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _warn(self, what: str, error: Exception) -> None:
        if not self._warned:
            log.warning("the cache of plans in %s %s: %r", self.folder, what, error)
        self._warned = True
