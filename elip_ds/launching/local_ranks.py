"""Start ranks on this node, wait for them, and leave nothing of them behind, however they end.

Each rank leads a session of its own, so that it dies with all its children and without whatever
started the launcher; it also dies with the launcher itself (tether.py). It says where it is in
heartbeat-RANK.json; who says nothing for too long hangs.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from elip_ds.launching.endings import Ending, RankHung, classify, hung_line, read_beat
from elip_ds.launching.limits import count_oom_kills

TETHER = Path(__file__).with_name("tether.py")
SHARED_MEMORY = Path("/dev/shm")
STARTING = 4
"For imports, and what is compiled: DeepSpeed's extensions, a model's blocks."
SETTLE_SECONDS = 2.0
"After the first failure, for the others' to come: which was the cause shows only then."
GRACE_SECONDS = 1.0
"Between asking a rank to end and ending it."


@dataclass(frozen=True)
class Patience:
    """silent_seconds: the longest without a new heartbeat; until the first steps are done STARTING
    times as long.  total_seconds: for all of one start.
    """

    silent_seconds: float = 120
    total_seconds: float = 900


def run_ranks(
    command: Sequence[str],
    *,
    ranks: int,
    folder: Path,
    patience: Patience,
    environ: Mapping[str, str] = os.environ,
) -> Ending:
    """Run a command as so many ranks until all have left or one has failed.

    environ: theirs, to which is added what makes them ranks.  folder: where they write;
    rank-RANK.log there is what one said.  Raises RankHung. When it returns or raises, also for
    Ctrl-C or SIGTERM, none of the processes is left.
    """
    port, killed_before = free_port(), count_oom_kills()
    processes: list[subprocess.Popen] = []
    with _term_raises():
        try:
            for rank in range(ranks):
                env = _as_rank(environ, rank, ranks, port)
                processes.append(_start(command, env, folder / f"rank-{rank}.log"))
            codes = _wait(processes, folder, patience)
        finally:
            _end(processes)
            _clear_shared_memory(port)
    if all(code == 0 for code in codes):
        return Ending("done")
    return classify(folder, codes, kernel_killed=count_oom_kills() > killed_before)


def _as_rank(environ: Mapping[str, str], rank: int, ranks: int, port: int) -> dict[str, str]:
    # As training shares the cores (run.py): threads take memory, too.
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks))}
    # torchrun's word that a store is there already, which these ranks would wait for.
    ours = {k: v for k, v in environ.items() if not k.startswith("TORCHELASTIC_")}
    return {
        **threads,
        **ours,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _start(command: Sequence[str], env: dict[str, str], log: Path) -> subprocess.Popen:
    tethered = [sys.executable, "-I", "-S", str(TETHER), str(os.getpid()), *command]
    with log.open("wb") as output:
        return subprocess.Popen(
            tethered,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(processes: list[subprocess.Popen], folder: Path, patience: Patience) -> list[int | None]:
    """Until all have left or one has failed: exit statuses by rank, None of one that runs."""
    started = time.time()
    settled_by = float("inf")
    while True:
        codes = [_ended(process) for process in processes]
        now = time.time()
        if None not in codes or any((folder / f"oom-{r}.json").exists() for r in range(len(codes))):
            return codes
        if any(codes):
            settled_by = min(settled_by, now + SETTLE_SECONDS)
            if now > settled_by:
                return codes
        else:
            _check_progress(folder, codes, patience, started)
        time.sleep(0.02)


def _check_progress(
    folder: Path, codes: list[int | None], patience: Patience, started: float
) -> None:
    """Raises RankHung. Of several silent ranks the first is named: others wait for it."""
    now = time.time()
    heard = {rank: _heard(folder, rank, started) for rank, code in enumerate(codes) if code is None}
    rank = min(heard, key=lambda rank: heard[rank])
    silent = now - heard[rank]
    starting = read_beat(folder, rank).get("starting", False)
    if silent > patience.silent_seconds * (STARTING if starting else 1):
        raise RankHung(hung_line(folder, rank, silent, len(codes)))
    if now - started > patience.total_seconds:
        line = hung_line(folder, rank, silent, len(codes))
        raise RankHung(f"not done within {patience.total_seconds:.0f} s: {line}")


def _heard(folder: Path, rank: int, started: float) -> float:
    try:
        return (folder / f"heartbeat-{rank}.json").stat().st_mtime
    except FileNotFoundError:
        return started


def _ended(process: subprocess.Popen) -> int | None:
    """As poll(), but the process keeps its number, so that its group can still be ended."""
    if process.returncode is not None:
        return process.returncode
    found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _end(processes: list[subprocess.Popen]) -> None:
    """All processes of all groups: first asked, then, GRACE_SECONDS later, not asked."""
    running = [process for process in processes if _ended(process) is None]
    for process in running:
        _signal(process, signal.SIGTERM)
        _signal(process, signal.SIGCONT)  # one that is stopped hears nothing
    deadline = time.time() + GRACE_SECONDS
    while time.time() < deadline and any(_ended(process) is None for process in running):
        time.sleep(0.01)
    for process in processes:
        _signal(process, signal.SIGKILL)  # the group, whose leader may be gone
        process.wait()


def _signal(process: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


@contextmanager
def _term_raises() -> Iterator[None]:
    """SIGTERM ends this process as Ctrl-C does, through what is to be cleared away."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may ask for signals
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _clear_shared_memory(port: int) -> None:
    """What DeepSpeed's all-reduce in shared memory leaves behind when its ranks are killed."""
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{port}_*"
    for path in SHARED_MEMORY.glob(name):
        path.unlink(missing_ok=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
