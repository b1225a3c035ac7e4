"""How much memory a rank may take on this node, and what says so.

A CPU has several who say it: the kernel's cgroup, Slurm, the limits of a process, what is free, and
the user. A GPU says itself what is free, through nvidia-smi: asking CUDA would put a context there.
"""

import csv
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elip_ds.batching.sizes import show_bytes
from elip_ds.launching.endings import DeviceBusy

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
NO_LIMIT_BYTES = 2**60
"As much or more means that a cgroup (version 1) has no limit."
IDLE_BYTES = 2**30
"A device whose used memory is less is free: the driver keeps some of it for itself."
_QUERY_GPUS = "--query-gpu=index,uuid,name,memory.total,memory.used,memory.free"
_QUERY_PROCESSES = "--query-compute-apps=gpu_uuid,pid,used_memory"
_FORMAT = "--format=csv,noheader,nounits"


@dataclass(frozen=True)
class Limit:
    """bytes: that one rank may take.  name: what sets the limit, and to what.  of_node: a share of
    the node's, out of which comes what the rank's loader takes, too.
    """

    name: str
    bytes: int
    of_node: bool = False


def host_budget(
    ranks: int,
    *,
    given_bytes: int | None = None,
    environ: Mapping[str, str] = os.environ,
    proc: Path = PROC,
    cgroup: Path = CGROUP,
) -> Limit:
    """The binding one of host_limits."""
    limits = host_limits(ranks, given_bytes=given_bytes, environ=environ, proc=proc, cgroup=cgroup)
    return min(limits, key=lambda limit: limit.bytes)


def host_limits(
    ranks: int,
    *,
    given_bytes: int | None = None,
    environ: Mapping[str, str] = os.environ,
    proc: Path = PROC,
    cgroup: Path = CGROUP,
) -> list[Limit]:
    """All that bound the memory of one of so many ranks on this node.

    given_bytes: the user's word, of one rank; so are the limits of a process. The others are the
    node's and divided among the ranks.  Raises DeviceBusy when nothing says what is free.
    """
    node = [*_free(proc), *_cgroup_limits(proc, cgroup), *_slurm_limits(environ)]
    if not node:
        raise DeviceBusy(f"{proc}/meminfo does not say how much memory is free on this node")
    limits = [
        Limit(f"{limit.name}, for {ranks} ranks", limit.bytes // ranks, of_node=True)
        for limit in node
    ]
    for name, number in (("RLIMIT_DATA", resource.RLIMIT_DATA), ("RLIMIT_AS", resource.RLIMIT_AS)):
        soft = resource.getrlimit(number)[0]
        if soft != resource.RLIM_INFINITY:
            limits.append(Limit(f"{name} {show_bytes(soft)} of a process", soft))
    if given_bytes is not None:
        limits.append(Limit(f"{show_bytes(given_bytes)} as given", given_bytes))
    return limits


def count_oom_kills(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Processes of this one's cgroup that the kernel has ended for want of memory so far.

    Whichever limit it was that bound them; those above count the processes of others, too.
    """
    for folder, _ in _cgroup_folders(proc, cgroup):
        for name in ("memory.events", "memory.oom_control"):
            table = _read_table(folder / name)
            if "oom_kill" in table:
                return table["oom_kill"]
    return 0


def _free(proc: Path) -> list[Limit]:
    free = _read_table(proc / "meminfo").get("MemAvailable:")
    return [] if free is None else [Limit(f"{show_bytes(free * 1024)} available", free * 1024)]


def _cgroup_limits(proc: Path, cgroup: Path) -> Iterator[Limit]:
    for folder, version in _cgroup_folders(proc, cgroup):
        name, used_name, cache = {
            1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            2: ("memory.max", "memory.current", "inactive_file"),
        }[version]
        limit, used = _read_number(folder / name), _read_number(folder / used_name)
        if limit is None or limit >= NO_LIMIT_BYTES:
            continue
        used = max(0, (used or 0) - _read_table(folder / "memory.stat").get(cache, 0))
        text = f"{folder / name} {show_bytes(limit)} with {show_bytes(used)} in use"
        yield Limit(text, max(0, limit - used))


def _cgroup_folders(proc: Path, cgroup: Path) -> Iterator[tuple[Path, int]]:
    """Of the memory of this process, with the version: its own and those above, which bind, too.

    In a container the path is often that of the host; then only what exists counts.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, version = cgroup / "memory", 1
        elif number == "0":
            root, version = cgroup, 2
        else:
            continue
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            if folder.is_dir():
                yield folder, version
            if folder == root:
                break


def _slurm_limits(environ: Mapping[str, str]) -> Iterator[Limit]:
    """Slurm counts in MiB; 0 is all that the node has."""
    per_node = _whole(environ.get("SLURM_MEM_PER_NODE"))
    per_cpu, cpus = (_whole(environ.get(f"SLURM_{x}")) for x in ("MEM_PER_CPU", "CPUS_ON_NODE"))
    if per_node:
        yield Limit(f"SLURM_MEM_PER_NODE={per_node} MiB", per_node * 2**20)
    elif per_cpu and cpus:
        yield Limit(f"SLURM_MEM_PER_CPU={per_cpu} MiB on {cpus} CPUs", per_cpu * cpus * 2**20)


@dataclass(frozen=True)
class Gpu:
    """holders: processes that hold its memory, with bytes; None where the driver does not say."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    used_bytes: int
    free_bytes: int
    holders: tuple[tuple[int, int | None], ...] = ()


def read_gpus() -> list[Gpu]:
    """Those of this node that CUDA may use: by nvidia-smi or, where that is missing or knows no
    part of a GPU (MIG), by a process of torch's, whose own context then counts as used. Raises
    DeviceBusy when neither tells.
    """
    try:
        return visible_gpus(parse_gpus(_ask(_QUERY_GPUS), _ask(_QUERY_PROCESSES)))
    except DeviceBusy:
        gpus = _gpus_by_torch()
        if not gpus:
            raise
        return gpus


_BY_TORCH = """
import torch
for i in range(torch.cuda.device_count()):
    free, total = torch.cuda.mem_get_info(i)
    print(i, free, total, torch.cuda.get_device_name(i))
"""


def _gpus_by_torch() -> list[Gpu]:
    """In a process of its own: a context would stay in this one."""
    try:
        found = subprocess.run(
            [sys.executable, "-c", _BY_TORCH],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        rows = [line.split(maxsplit=3) for line in found.stdout.splitlines()]
        return [
            Gpu(int(i), "", name, int(total), int(total) - int(free), int(free))
            for i, free, total, name in rows
        ]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def parse_gpus(gpus: str, processes: str) -> list[Gpu]:
    """From the two answers of nvidia-smi, comma-separated, without header and units."""
    holders: dict[str, list[tuple[int, int | None]]] = {}
    for uuid, pid, held in _rows(processes, 3):
        holders.setdefault(uuid, []).append((int(pid), _mebibytes(held)))
    found = []
    for index, uuid, name, *memory in _rows(gpus, 6):
        numbers = [number for text in memory if (number := _mebibytes(text)) is not None]
        if len(numbers) < 3:
            raise DeviceBusy(f"GPU {index}: nvidia-smi does not say what memory it has: {memory}")
        total, used, free = numbers
        found.append(Gpu(int(index), uuid, name, total, used, free, tuple(holders.get(uuid, ()))))
    return found


def visible_gpus(gpus: Sequence[Gpu], environ: Mapping[str, str] = os.environ) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES names, by index or the beginning of the uuid, in its order.

    nvidia-smi counts by place on the bus; CUDA does where CUDA_DEVICE_ORDER=PCI_BUS_ID, and else
    only among GPUs of one kind.  Raises DeviceBusy for a name that is none of them, such as that of
    a part of a GPU (MIG).
    """
    wanted = environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return list(gpus)
    chosen = []
    for name in filter(None, (part.strip() for part in wanted.split(","))):
        fits = [g for g in gpus if name == str(g.index) or g.uuid.startswith(name)]
        if not fits:
            known = ", ".join(f"{g.index} ({g.uuid})" for g in gpus)
            raise DeviceBusy(f"CUDA_VISIBLE_DEVICES={wanted}: {name} is none of {known}")
        chosen.append(fits[0])
    return chosen


def cuda_budget(ranks: int, gpus: Sequence[Gpu], given_bytes: int | None = None) -> Limit:
    """What is free on the fullest of the devices that so many ranks use, or the given if less.

    Raises DeviceBusy, naming who holds what, when one of them is in use.
    """
    used = [gpus[rank % len(gpus)] for rank in range(ranks)]
    for gpu in used:
        if gpu.used_bytes >= IDLE_BYTES:
            raise DeviceBusy(_holders(gpu))
    fullest = min(used, key=lambda gpu: gpu.free_bytes)
    limits = [Limit(f"GPU {fullest.index}: {_of(fullest)}", fullest.free_bytes)]
    if given_bytes is not None:
        limits.append(Limit(f"{show_bytes(given_bytes)} as given", given_bytes))
    return min(limits, key=lambda limit: limit.bytes)


def _holders(gpu: Gpu) -> str:
    parts = [
        f"{'memory' if held is None else show_bytes(held)} held by pid {pid}"
        for pid, held in gpu.holders
    ]
    who = (
        ", ".join(parts)
        or f"{show_bytes(gpu.used_bytes)} held by processes that cannot be seen here"
    )
    return f"GPU {gpu.index}: {who}; {_of(gpu)}"


def _of(gpu: Gpu) -> str:
    return f"{show_bytes(gpu.free_bytes)} free of {show_bytes(gpu.total_bytes)}"


def _ask(query: str) -> str:
    try:
        found = subprocess.run(
            ["nvidia-smi", query, _FORMAT], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise DeviceBusy(f"nvidia-smi does not say what memory is free: {error}") from None
    return found.stdout


def _rows(text: str, width: int) -> list[list[str]]:
    rows = ([cell.strip() for cell in row] for row in csv.reader(text.splitlines()))
    return [row for row in rows if len(row) == width]


def _mebibytes(text: str) -> int | None:
    number = _whole(text)
    return None if number is None else number * 2**20


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _read_table(path: Path) -> dict[str, int]:
    """'name number ...' a line -> {name: number}; empty where there is no such file."""
    try:
        lines = (line.split() for line in path.read_text().splitlines())
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def _read_number(path: Path) -> int | None:
    """None where there is no such file, or the word 'max' in it."""
    try:
        return _whole(path.read_text().strip())
    except OSError:
        return None
