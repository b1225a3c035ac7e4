"""How a group of ranks ended: read from what they left in their folder, and from how they exited.

engine/trial_job.py says what the files are. The first cause counts, not the first to be seen: when
a rank dies, its peers fail a moment later in their collectives.
"""

import json
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elip_ds.batching.memory import PHASES
from elip_ds.batching.sizes import show_bytes
from elip_ds.engine.out_of_memory import OUT_OF_MEMORY_STATUS
from elip_ds.errors import UserError

# What gloo and NCCL say of a collective that another rank has left. Their threads also abort then,
# so that a death by a signal may be cause or consequence.
_PEER_GONE = re.compile(
    "connection (was )?(closed|reset|refused)|broken pipe|remote process|remote error",
    re.IGNORECASE,
)


class LaunchError(UserError):
    """What a launcher could not do."""


class RankFailed(LaunchError):
    """A rank ended for a reason that is not memory; a smaller batch would not help."""

    status = 12


class RankHung(LaunchError):
    """No progress, or not within the time that was given."""

    status = 13


class DoesNotFit(LaunchError):
    """Not even the smallest micro-batch."""

    status = 10


class DeviceBusy(LaunchError):
    """Others hold the device's memory, or nobody can say how much there is."""

    status = 15


@dataclass(frozen=True)
class Ending:
    """how: done, out_of_memory, suspected (of that), failed or refused (by a UserError).

    reason: one line that names the rank.  micro_batch_size: where it happened, None before any.
    reached_bytes: when memory ran out, the most that had been in use.
    """

    how: str
    reason: str = ""
    micro_batch_size: int | None = None
    reached_bytes: int | None = None


def read_records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """KIND-RANK.json of all ranks that left one."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{kind}-*.json"))]


def read_beat(folder: Path, rank: int) -> dict[str, Any]:
    """A rank's last heartbeat; before its first it is starting."""
    path = folder / f"heartbeat-{rank}.json"
    if not path.exists():
        return {"micro_batch_size": None, "phase": "start", "step": 0, "starting": True}
    return json.loads(path.read_text())


def classify(folder: Path, codes: Sequence[int | None], *, kernel_killed: bool) -> Ending:
    """codes: exit statuses by rank, a signal's negative, None while a rank runs; one at least is
    neither None nor 0.  kernel_killed: the kernel ended a process for want of memory meanwhile.
    """
    out = sorted(read_records(folder, "oom"), key=lambda record: record["time"])
    if out:
        reached = max(record["peak_bytes"] for record in out)
        return Ending("out_of_memory", _told(out[0]), out[0]["micro_batch_size"], reached)
    for rank, code in enumerate(codes):
        if code == OUT_OF_MEMORY_STATUS or (code == -signal.SIGKILL and kernel_killed):
            beat = read_beat(folder, rank)
            by = "was killed by the kernel" if code < 0 else "left"
            reason = f"rank {rank} {by} for want of memory {_place(beat)}"
            return Ending("out_of_memory", reason, beat["micro_batch_size"])
    errors = sorted(read_records(folder, "error"), key=lambda record: record["time"])
    own = [record for record in errors if not _PEER_GONE.search(record["message"])]
    if own:
        return _erred(own[0])
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            return _died(rank, read_beat(folder, rank), signal.Signals(-code).name)
    if errors:
        return _erred(errors[0])
    rank, code = next((rank, code) for rank, code in enumerate(codes) if code)
    reason = f"rank {rank} left with status {code} {_place(read_beat(folder, rank))}"
    return Ending("failed", f"{reason}: {_last_line(folder / f'rank-{rank}.log')}")


def hung_line(folder: Path, rank: int, seconds: float, ranks: int) -> str:
    beat = read_beat(folder, rank)
    return f"rank {rank} silent for {seconds:.0f} s {_place(beat)}; {ranks} ranks were ended"


def _erred(record: dict[str, Any]) -> Ending:
    if record["kind"] == "UserError":
        return Ending("refused", record["message"], _size(record))
    reason = f"rank {record['rank']} failed {_place(record)}: {record['last_line']}"
    return Ending("failed", reason, _size(record))


def _died(rank: int, beat: dict[str, Any], name: str) -> Ending:
    """Of a signal. A failed allocation in a library ends in SIGSEGV or SIGABRT now and then."""
    reason = f"rank {rank} died of {name} {_place(beat)}"
    if beat["phase"] in PHASES and name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGKILL"):
        return Ending("suspected", f"{reason}, perhaps for want of memory", _size(beat))
    return Ending("failed", reason, _size(beat))


def _size(beat: dict[str, Any]) -> int | None:
    return beat["micro_batch_size"]


def _told(record: dict[str, Any]) -> str:
    asked = record.get("asked_bytes")
    what = f"asked for {show_bytes(asked)} more" if asked else "ran out of memory"
    in_use = show_bytes(record["in_use_bytes"])
    return f"rank {record['rank']} {what} {_place(record)}, with {in_use} in use"


def _place(beat: dict[str, Any]) -> str:
    if beat["micro_batch_size"] is None:
        return f"in {beat['phase']}"
    return f"in {beat['phase']} at micro-batch {beat['micro_batch_size']}, step {beat['step']}"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
