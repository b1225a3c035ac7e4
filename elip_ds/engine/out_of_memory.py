"""What it looks like when memory runs out, and how a rank leaves then.

A rank that is out of memory cannot go on: after such an error the next attempt in the same process
fails more often than not, and its peers wait for it in a collective. So it writes down where it was
and ends at once; whoever started the ranks ends the others.
"""

import errno
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch

OUT_OF_MEMORY_STATUS = 77
"Exit status of a rank whose memory ran out; oom-RANK.json says where."

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


def leave_out_of_memory(folder: Path, rank: int, error: BaseException, **where: Any) -> NoReturn:
    """Write oom-RANK.json, with what the caller knows of where it was, and end this process.

    No collective and no tear-down: the peers are inside one already.
    """
    traceback.print_exception(error)
    record = {"rank": rank, **where, "asked_bytes": asked_bytes(error)}
    write_whole(folder / f"oom-{rank}.json", record)
    sys.stderr.flush()
    os._exit(OUT_OF_MEMORY_STATUS)


def write_whole(path: Path, record: dict[str, Any]) -> None:
    """As JSON, whole or not at all: whoever reads it does so while ranks run and die."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(record))
    os.replace(partial, path)
