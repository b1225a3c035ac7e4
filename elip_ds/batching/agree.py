"""Nodes tell each other their answers through a folder that all of them see."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from elip_ds.errors import UserError

POLL_SECONDS = 0.1
FAILED = "failed"
"Key of an answer that is none: the reason, in one line."


def agree_on(
    folder: Path,
    name: str,
    answer: Mapping[str, object],
    names: Sequence[str],
    *,
    token: str,
    timeout_seconds: float,
) -> dict[str, dict]:
    """The answers of all nodes by name, the same on each of them.

    token: names this attempt, the same on all nodes and never used before in this folder, such as
    a job's id with its count of restarts.

    Raises UserError with the reason of the first node whose answer is FAILED, as soon as it is
    there, and after timeout_seconds with the names of those that gave none.
    """
    assert name in names and len(set(names)) == len(names), (name, names)
    attempt = folder / f"attempt-{token}"
    _write(attempt, name, answer)
    answers: dict[str, dict] = {}
    deadline = time.monotonic() + timeout_seconds
    while True:
        for other in names:
            if other not in answers and (path := _path(attempt, other)).exists():
                answers[other] = json.loads(path.read_bytes())
                if FAILED in answers[other]:
                    raise UserError(f"{other}: {answers[other][FAILED]}")
        if len(answers) == len(names):
            return {other: answers[other] for other in names}
        if time.monotonic() > deadline:
            late = ", ".join(other for other in names if other not in answers)
            raise UserError(
                f"no answer from {late} within {timeout_seconds:g} s, {len(answers)} of "
                f"{len(names)} nodes wrote one to {attempt}; all of them have to see that folder"
            )
        time.sleep(POLL_SECONDS)


def smallest(answers: Mapping[str, Mapping[str, int]], key: str = "micro_batch_size") -> str:
    """The name whose answer binds all others; of equals the first."""
    return min(answers, key=lambda name: answers[name][key])


def _write(attempt: Path, name: str, answer: Mapping[str, object]) -> None:
    """At once, or not at all: another node may read at any time, and this one may die."""
    partial = attempt / f".{name}.partial"
    try:
        attempt.mkdir(parents=True, exist_ok=True)
        with partial.open("w") as file:
            json.dump(answer, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, _path(attempt, name))
    except OSError as error:
        raise UserError(f"{partial} cannot be written: {error.strerror}") from None


def _path(attempt: Path, name: str) -> Path:
    return attempt / f"node-{name}.json"
