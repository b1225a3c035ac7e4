"""What it looks like when memory runs out, and how a rank leaves then.

A rank that is out of memory cannot go on: after such an error the next attempt in the same process
fails more often than not, and its peers wait for it in a collective. So it writes down where it was
and ends at once; whoever started the ranks ends the others.
"""

import errno
import json
import os
import re
import resource
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from elip_ds import dist
from elip_ds.batching import Plan, next_smaller
from elip_ds.run import CONFIG, PLAN, Run

OUT_OF_MEMORY_STATUS = 77
"Exit status of a rank whose memory ran out; oom-RANK.json says where."

OOM_FOLDER = "memory"
"In a run's folder: what ranks wrote that ran out of memory."
LAUNCHER = "elip_ds.launch run"
RETRIES = "ELIP_DS_OUT_OF_MEMORY_RETRIES"
"Variable by which the launcher tells a run how often it was started again."

_SIGNS = re.compile(
    "|".join(
        (
            "out of memory",  # CUDA, HIP, and NCCL's "Cuda failure 'out of memory'"
            "can't allocate memory",  # DefaultCPUAllocator
            "could not create a (primitive|memory)",  # oneDNN, instead of the allocator's message
            "CU[A-Z]+_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSPARSE
            "Cannot allocate memory",  # the system's own words
        )
    ),
    re.IGNORECASE,
)
_UNITS = {"": 1, "bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one that it was raised from, says that memory ran out."""
    if error is None:
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, RuntimeError) and _SIGNS.search(str(error)):
        return True
    return is_out_of_memory(error.__cause__)


def asked_bytes(error: BaseException) -> int | None:
    """What the allocation asked for, where the message says so."""
    found = re.search(r"[Tt]ried to allocate ([0-9.]+) ?(bytes|[KMG]iB)?", str(error))
    return int(float(found[1]) * _UNITS[found[2] or ""]) if found else None


def leave_out_of_memory(
    folder: Path, rank: int, error: BaseException, *, told: str = "", **where: Any
) -> NoReturn:
    """Write oom-RANK.json, with what the caller knows of where it was, and end this process.

    told: a line for a person, below the traceback.
    No collective and no tear-down: the peers are inside one already.
    """
    traceback.print_exception(error)
    if told:
        sys.stderr.write(f"error: {told}\n")
    record = {"rank": rank, **where, "asked_bytes": asked_bytes(error)}
    write_whole(folder / f"oom-{rank}.json", record)
    sys.stderr.flush()
    os._exit(OUT_OF_MEMORY_STATUS)


def leave_when_out_of_memory(run: Run, plan: Plan, min_micro_batch: int) -> None:
    """From now on an uncaught error of that kind ends this rank as leave_out_of_memory does, with
    the record in RUN/memory, from which the launcher starts again (launching/supervise.py).
    """
    before = sys.excepthook

    def hook(kind: Any, error: BaseException, trace: Any) -> None:
        if not is_out_of_memory(error):
            before(kind, error, trace)
            return
        _lift_limits()
        now = plan.at(run.keep_ratios) if plan.later else plan
        micro = now.micro_batches[run.rank]
        smaller = next_smaller(now, micro, min_micro_batch)
        advice = (
            "no smaller micro-batch makes the same global batch"
            if smaller is None
            else f"start again with batching.micro_batch_size={smaller.micro_batch_size}, which "
            f"goes on from the last checkpoint; python -m {LAUNCHER} does so by itself"
        )
        where = {
            "micro_batch_size": micro,
            "gradient_accumulation_steps": now.gradient_accumulation_steps,
            "micro_batches": now.micro_batches,
            "keep_ratios": run.keep_ratios,
            "follows_schedule": bool(plan.later),
            "min_micro_batch": min_micro_batch,
            "step": run.step,
            "time": time.time(),
            "fingerprints": _fingerprints(run),
        }
        folder = run.dir / OOM_FOLDER
        folder.mkdir(exist_ok=True)
        told = f"rank {run.rank} ran out of memory at step {run.step}, micro-batch "
        told += f"{micro}; {advice}"
        leave_out_of_memory(folder, run.rank, error, told=told, **where)

    sys.excepthook = hook


def ran_out_of_memory(run_dir: Path) -> bool:
    """In this run, ever."""
    return any((run_dir / OOM_FOLDER).glob("oom-*.json")) and (run_dir / CONFIG).is_file()


def _fingerprints(run: Run) -> list[str]:
    """Of what this node's micro-batch rests on now, so that the record counts against no other."""
    try:
        nodes = json.loads((run.dir / PLAN).read_text())["nodes"]
    except (OSError, ValueError, KeyError):
        return []
    name, lead = dist.node_name(), run.rank - run.ranks.local_rank
    answer = nodes.get(f"{name}-{lead}") or nodes.get(name) or {}
    part = answer_at(answer, run.keep_ratios)
    return [part["failure_key"]] if "failure_key" in part else []


def answers_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """A node's, as plan.json has it, for each stretch of the pruning schedule."""
    return [answer, *answer.get("later", ())]


def answer_at(answer: dict[str, Any], keep_ratios: Sequence[float]) -> dict[str, Any]:
    """The one of the stretch with these; the first where no other is meant."""
    wanted = list(keep_ratios)
    return next((one for one in answers_of(answer) if one.get("keep_ratios") == wanted), answer)


def _lift_limits() -> None:
    """Of this process, so that it can still write down where it was."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def write_whole(path: Path, record: dict[str, Any]) -> None:
    """As JSON, whole or not at all: whoever reads it does so while ranks run and die."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(record))
    os.replace(partial, path)
