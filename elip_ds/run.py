"""One run: its ranks, seed, folder and stop signal."""

import errno
import fcntl
import json
import logging
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from elip_ds import dist
from elip_ds.config import Config, changed_keys, dump_config, read_config
from elip_ds.errors import NodeError, UserError
from elip_ds.logs import setup_logging

log = logging.getLogger(__name__)

# What a run's folder and each of its checkpoints hold.
CONFIG = "config.yaml"
TOKENIZER = "tokenizer.json"
WEIGHTS = "weights.safetensors"
STATE = "state.safetensors"
PLAN = "plan.json"
"What was settled of the batch, and what it rests on."
LOCK = ".lock"
LOCK_SECONDS = 30.0
"For the start before this one to end."
_held: list[int] = []
STOP_EVERY = 10
"""Steps between two agreements on stopping, each of which waits for the device once, or about so
many seconds where steps take more than one."""
STOP_FILE = "ELIP_STOP_FILE"
BEAT_FILE = "ELIP_BEAT_FILE"
"""Variables by which a batch script names two files: one that it makes when the ranks shall stop,
and one that rank 0 writes: a line each for the run's folder, what `latest` named at the start, and
in the end done or stopped. Rank 0 touches it at every step: where it does not, the run hangs."""

META = "meta.json"
"The last file of a checkpoint to be written; a folder without it is none."


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first. A folder gets its name only when all of it is on disk."""
    return sorted(p for p in folder.glob("step-*") if (p / META).is_file())


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder itself, or the newest one of a run. Raises UserError if there is none."""
    if (path / META).is_file():
        return path
    found = list_checkpoints(path / "ckpt")
    if not found:
        raise UserError(f"{path} is neither a checkpoint nor a run that has one")
    return found[-1]


@dataclass
class Run:
    """dir: the run's folder.  seed: of the whole run; ranks that must differ add their number.
    step: the last that agree_to_stop heard of.  keep_ratios: those of the pruning schedule by now,
    where the micro-batch follows it.  save_every_seconds: None: never by the clock.
    """

    ranks: dist.Ranks
    dir: Path
    seed: int
    started: float = field(default_factory=time.time)
    stop_asked: bool = False
    step: int = 0
    keep_ratios: tuple[float, ...] = ()
    save_every_seconds: float | None = None
    _stopping: bool = False
    _saving: bool = False
    _saved: float | None = None
    _agree_at: int = 0
    _agreed: tuple[int, float] | None = None
    _parent: int = field(default_factory=os.getppid)

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        return self.ranks.world_size

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def first_on_node(self) -> bool:
        return self.ranks.local_rank == 0

    @property
    def resumes(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return bool(list_checkpoints(self.dir / "ckpt"))

    @property
    def stopping(self) -> bool:
        """True on all ranks, or on none, once agree_to_stop has heard of a signal."""
        return self._stopping

    @property
    def saving(self) -> bool:
        """True on all ranks, or on none, at the step at which rank 0's clock asked for it."""
        return self._saving

    def agree_to_stop(self, step: int = 0) -> None:
        """Every few steps all ranks learn whether any was asked to stop, and whether it is time to
        save, and when to agree next. Every rank calls it.

        Asked by a signal, or by a file that appears where ELIP_STOP_FILE says: a batch script has
        no way to signal the ranks alone.
        """
        self.step, self._saving = step, False
        if self.first and (beat := os.environ.get(BEAT_FILE)):
            with suppress(OSError):  # the script was cancelled, and has taken it along
                os.utime(beat)
        if step < self._agree_at:
            return
        if not self.stop_asked:
            self._look_around()
        asked = [self.stop_asked, self._save_is_due(), self._steps_to_next(step)]
        told = dist.max_over_ranks(torch.tensor(asked, dtype=torch.int, device=self.device))
        stop, save, steps = told.tolist()
        self._stopping, self._saving, self._agree_at = bool(stop), bool(save), step + steps

    def _steps_to_next(self, step: int) -> int:
        """By rank 0's clock; 0 elsewhere."""
        if not self.first:
            return 0
        now, before = time.monotonic(), self._agreed
        self._agreed = step, now
        if before is None or step <= before[0]:
            return 1
        seconds = (now - before[1]) / (step - before[0])
        return int(STOP_EVERY / max(1.0, min(STOP_EVERY, seconds)))

    def _look_around(self) -> None:
        if self.first and os.path.exists(os.environ.get(STOP_FILE, "")):
            self.stop_asked = True
            log.warning("%s is there: saving", os.environ[STOP_FILE])
        if "SLURM_STEP_ID" in os.environ and os.getppid() != self._parent:
            # Slurm no longer knows of this process: it would neither end it nor hear of its end,
            # and the job would stay RUNNING.
            self.stop_asked = True
            log.warning("rank %d: Slurm's step daemon here is gone: saving", self.rank)

    def _save_is_due(self) -> bool:
        """By rank 0's clock, which starts with the first step."""
        if self.save_every_seconds is None or not self.first:
            return False
        now = time.monotonic()
        if self._saved is None:
            self._saved = now
        due = now - self._saved >= self.save_every_seconds
        if due:
            self._saved = now
        return due

    def wait(self) -> None:
        """Until all ranks are here."""
        dist.barrier()

    def write_text(self, path: Path, text: str) -> None:
        """Write a small file whole or not at all."""
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)

    def note_skipped(self, shard: str, key: str, reason: str) -> None:
        """A line in skipped.jsonl, and a warning for the first of them."""
        path = self.dir / "skipped.jsonl"
        if not path.exists():
            log.warning("skipped sample %s of %s (%s); more in %s", key, shard, reason, path)
        try:
            with path.open("a") as file:
                file.write(json.dumps({"shard": shard, "key": key, "reason": reason}) + "\n")
        except OSError as error:  # a full disk stops no run here
            log.warning("%s is not written: %s", path, error.strerror)


def tell_job(*lines: str) -> None:
    """Rank 0 adds lines to ELIP_BEAT_FILE, if a batch script has named one."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank == "0" and (beat := os.environ.get(BEAT_FILE)):
        with suppress(OSError), open(beat, "a") as file:
            file.write("".join(f"{line}\n" for line in lines))


def _begins(folder: Path) -> tuple[str, str]:
    """A run's folder, and what `latest` names there."""
    with suppress(OSError):
        return str(folder.absolute()), (folder / "ckpt" / "latest").read_text()
    return str(folder.absolute()), "none"


def open_run(config: Config) -> Run:
    """Who is who, the folder, the stop signal; no device is touched and no group joined yet.

    Raises UserError when the folder is another run's.
    """
    folder = Path(config.run.dir) / config.run.name
    tell_job(*_begins(folder))  # first of all, so that the script knows what a refusal is of
    ranks = dist.read_ranks()
    setup_logging(ranks.rank)
    minutes = config.checkpoint.every_minutes
    run = Run(
        ranks,
        folder,
        config.run.seed,
        save_every_seconds=None if minutes is None else 60 * minutes,
    )
    seen = torch.cuda.device_count()
    if run.first_on_node and "SLURM_PROCID" in os.environ and seen > ranks.local_world_size:
        log.warning(
            "%s: %d of its %d GPUs are used; give sbatch --ntasks-per-node=%d",
            *(dist.node_name(), ranks.local_world_size, seen, seen),
        )
    problem = _claim_folder(run, config)  # before joining, so that a refusal takes no rendezvous
    if problem:
        raise UserError(problem)
    _watch_signals(run)
    _set_threads(ranks)
    dist.meet(ranks)
    return run


def hold_folder(folder: Path) -> None:
    """Keep other starts out of a run's folder until this process ends.

    They would remove each other's checkpoints and probes. By a lock of a whole file, of which NFS
    knows on all nodes; where a file system has none, nothing is kept out. A start before this one,
    as of a job that was requeued, may still be ending; where it never does, as on a node that is
    lost, its lock is not waited for. Raises UserError.
    """
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        return  # the first file that matters will say why
    end = time.monotonic() + LOCK_SECONDS
    job, start = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return
        else:
            break
        if time.monotonic() > end:
            holder = os.pread(handle, 200, 0).decode(errors="replace")
            whose, _, holders_start = holder.partition(", start ")
            if job and whose.endswith(f", job {job}") and holders_start != start:
                log.warning("the lock of %s is still held by %s; going on", folder, holder)
                return
            raise UserError(f"run.dir: {folder} is in use by {holder}; choose another run.name")
        time.sleep(0.2)
    told = f"process {os.getpid()} on {dist.node_name()}"
    told += f", job {job}, start {start}" if job else ""
    with suppress(OSError):  # a full disk
        os.ftruncate(handle, 0)
        os.pwrite(handle, told.encode(), 0)
    _held.append(handle)  # closing it would give the lock away


def join_ranks(run: Run, config: Config) -> None:
    """Join the other ranks, seed, keep the config."""
    dist.start(run.ranks, config.engine.timeout_seconds)
    seed_everything(run.seed)
    if run.first:
        run.write_text(run.dir / CONFIG, dump_config(config))
    run.wait()


def seed_everything(seed: int) -> None:
    """The same numbers on every rank: weights and queues are built from them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _claim_folder(run: Run, config: Config) -> str | None:
    """Raises NodeError. Returns why the folder is not this run's."""
    try:
        run.dir.mkdir(parents=True, exist_ok=True)
        if not os.access(run.dir, os.W_OK):
            raise NodeError(f"run.dir: {run.dir} cannot be written to")
    except OSError as error:
        raise NodeError(f"run.dir: {run.dir} cannot be made: {error.strerror}") from None
    if run.first:
        hold_folder(run.dir)
    kept = run.dir / CONFIG
    if not kept.exists() or config.run.allow_config_change:
        return None
    changed = changed_keys(read_config(kept), config)
    trained = (run.dir / "metrics.jsonl").exists() or any((run.dir / "ckpt").glob("step-*"))
    if changed and not trained and run.first:  # an earlier start went no further than its faults
        (run.dir / TOKENIZER).unlink(missing_ok=True)
    if not changed or not trained:
        return None
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return (
        f"{run.dir} belongs to another configuration ({'; '.join(changed[:3])}{more}); choose "
        "another run.name, or set run.allow_config_change=true to go on with the new one"
    )


def _watch_signals(run: Run) -> None:
    def ask(number: int, frame: FrameType | None) -> None:
        if run.stop_asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stop_asked = True
        log.warning("%s: saving within %d steps", signal.Signals(number).name, STOP_EVERY)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, ask)


def _set_threads(ranks: dist.Ranks) -> None:
    """Share the cores of a node among its ranks, unless OMP_NUM_THREADS already says how."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // ranks.local_world_size))
