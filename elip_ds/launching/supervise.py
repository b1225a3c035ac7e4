"""Run training; where memory runs out, start it again with a smaller micro-batch.

A rank that is out of memory writes RUN/memory/oom-RANK.json and leaves at once. Nothing is lost:
the run goes on from its last checkpoint with the same global batch.
"""

import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from elip_ds.batching import Plan, next_smaller
from elip_ds.batching.cache import Cache, default_folder
from elip_ds.engine.out_of_memory import OOM_FOLDER, RETRIES, answer_at, write_whole
from elip_ds.launching.endings import LaunchError
from elip_ds.launching.handover import Command
from elip_ds.launching.limits import count_oom_kills
from elip_ds.run import PLAN

log = logging.getLogger(__name__)

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

REFUSED = 2
"Exit status of a start that was refused: it would be again."

OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
"Variables that make a process a rank; a launcher that has inherited them is none."


class RetriesUsedUp(LaunchError):
    """Memory ran out again and again."""

    status = 20


def supervise(
    command_for: Callable[[int | None, int | None], Command], run_dir: Path, retries: int
) -> int:
    """Run training to its end and return its exit status.

    command_for: the command for a micro-batch and a global batch; None: what training settles by
    itself, which is a micro-batch below what has run out of memory. That is how a run goes on whose
    micro-batch follows the pruning schedule, so that its other stretches keep theirs.
    What was remembered of a batch that ran out of memory is forgotten, for other runs, too.
    Raises RetriesUsedUp with every micro-batch that was tried.
    """
    micro: int | None = None
    total: int | None = None
    tried: list[str] = []
    while True:
        started = time.time()
        status = _run(command_for(micro, total), len(tried))
        # A file server's clock may be ahead of this one: a run that ended well is never in doubt.
        record = newest_oom(run_dir, started) if status else None
        if record is None and status not in (0, REFUSED):
            record = _killed(run_dir, started)
        if record is None:
            return status
        failed, all_ranks = record["micro_batch_size"], record["micro_batches"]
        passes = record["gradient_accumulation_steps"]
        plan = Plan(max(all_ranks), passes, len(all_ranks), unequal=tuple(all_ranks))
        total = plan.global_batch_size
        _forget_answers(run_dir, record["keep_ratios"])
        told = _told(record)
        tried.append(str(failed))
        smaller = next_smaller(plan, failed, record["min_micro_batch"])
        if smaller is None:
            raise RetriesUsedUp(f"{told}; the global batch has no smaller divisor")
        if len(tried) > retries:
            raise RetriesUsedUp(
                f"out of memory at micro-batch {', '.join(tried)}; last: {told}. Set "
                f"batching.micro_batch_size={smaller.micro_batch_size}, or batching.oom_retries "
                "above " + str(retries)
            )
        log.warning(
            "%s; going on from the last checkpoint with micro-batch %d -> %s%d, accumulation %d -> "
            "%d, global batch %d as before (try %d of %d)",
            *(told, failed, "at most " if record["follows_schedule"] else ""),
            *(smaller.micro_batch_size, passes, smaller.gradient_accumulation_steps),
            *(plan.global_batch_size, len(tried) + 1, retries + 1),
        )
        micro = None if record["follows_schedule"] else smaller.micro_batch_size


def newest_oom(run_dir: Path, since: float) -> dict[str, Any] | None:
    """The first record that a rank left since then (seconds since 1970), of all of one start."""
    records = [
        json.loads(path.read_text())
        for path in (run_dir / OOM_FOLDER).glob("oom-*.json")
        if path.stat().st_mtime >= since
    ]
    return min(records, key=lambda record: record["time"], default=None)


def _forget_answers(run_dir: Path, ratios: list[float]) -> None:
    """Those that the run's plan rests on, in the stretch of the schedule with these keep ratios."""
    plan = run_dir / PLAN
    nodes = json.loads(plan.read_text())["nodes"].values() if plan.exists() else ()
    for answer in nodes:
        part = answer_at(answer, ratios)
        if "fingerprint" in part:
            Cache(default_folder()).forget(part["fingerprint"])


def _killed(run_dir: Path, since: float) -> dict[str, Any] | None:
    """The record of a rank that the kernel ended for want of memory, which could leave none.

    None where nobody was ended since the batch was settled, or where that says nothing of it: on a
    GPU, whose memory is not the host's, or where the micro-batch follows a schedule, of which the
    place is not known.
    """
    path = run_dir / PLAN
    if not path.exists() or path.stat().st_mtime < since:
        return None
    plan = json.loads(path.read_text())
    if count_oom_kills() <= plan["oom_kills"]:
        return None
    if plan["device"] != "cpu" or plan["later"]:
        log.error("the kernel ended a process for want of host memory: see data.workers, or --mem")
        return None
    answers = plan["nodes"].values()
    record = {
        "rank": None,
        "micro_batch_size": plan["micro_batch_size"],
        "micro_batches": plan["unequal"] or [plan["micro_batch_size"]] * plan["world_size"],
        "gradient_accumulation_steps": plan["gradient_accumulation_steps"],
        "min_micro_batch": plan["min_micro_batch"],
        "keep_ratios": [],
        "follows_schedule": False,
        "fingerprints": [part["failure_key"] for part in answers if "failure_key" in part],
        "time": time.time(),
    }
    (run_dir / OOM_FOLDER).mkdir(exist_ok=True)
    write_whole(run_dir / OOM_FOLDER / "oom-host.json", record)
    return record


def _told(record: dict[str, Any]) -> str:
    if record["rank"] is None:
        return (
            f"the kernel ended a rank for want of memory, micro-batch {record['micro_batch_size']}"
        )
    asked = record.get("asked_bytes")
    what = f" asking for {asked / 2**20:.0f} MiB" if asked else ""
    return (
        f"rank {record['rank']} ran out of memory{what} at step {record['step']}, micro-batch "
        f"{record['micro_batch_size']}"
    )


def _run(command: Command, retries: int) -> int:
    """One start, in a session of its own; signals to this process go to the ranks alone."""
    log.info("starting %s", command)
    own = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
    own[RETRIES] = str(retries)
    child = subprocess.Popen(command.words, env=own | command.environ, start_new_session=True)

    def forward(number: int, frame: FrameType | None) -> None:
        # DeepSpeed's launchers would die of it, and leave their ranks behind as orphans.
        ranks = _ranks_of(child.pid)
        for process in ranks or [psutil.Process(child.pid)]:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        return _status(child.wait())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _end_session(child.pid)


def _ranks_of(pid: int) -> list[psutil.Process]:
    """Descendants of a launcher that are ranks, not their loaders' workers."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            parent = process.parent()
            if "RANK" in process.environ() and not (parent and "RANK" in parent.environ()):
                found.append(process)
        except psutil.Error:  # it ended meanwhile
            continue
    return found


def _status(code: int) -> int:
    return code if code >= 0 else 128 - code


def _end_session(pid: int) -> None:
    """Whatever a launcher left behind."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
