"""The command that trains: `deepspeed` on this machine, `srun` inside a Slurm allocation."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import elip_ds
from elip_ds.errors import UserError
from elip_ds.launching.local_ranks import free_port

ALLOCATION_STEPS = ("batch", "4294967291", "4294967290")
"Slurm's names for the steps of a batch script and of a shell under salloc: not of srun's tasks."
TRAIN = Path(elip_ds.__file__).parent / "train.py"


@dataclass(frozen=True)
class Command:
    """words: as exec takes them.  environ: what is added to the environment."""

    words: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        environ = (f"{name}={shlex.quote(value)}" for name, value in self.environ.items())
        return " ".join([*environ, shlex.join(self.words)])


def training_command(
    settings: Sequence[str], ranks: int | None, env: Mapping[str, str] = os.environ
) -> Command:
    """settings: the words for train.py.  ranks: on this node; None: as many as it has devices.

    Raises UserError where there is no launcher.
    """
    if "SLURM_JOB_ID" in env and env.get("SLURM_STEP_ID", "batch") in ALLOCATION_STEPS:
        return _srun(settings, ranks, env)
    words = [_find("deepspeed")]
    if ranks is not None:
        words += ["--num_gpus", str(ranks)]
    if "MASTER_PORT" in env:
        words += ["--master_port", env["MASTER_PORT"]]
    else:  # DeepSpeed's default is everybody's default
        words += ["--master_port", str(free_port())]
    return Command((*words, str(TRAIN), *settings))


def _srun(settings: Sequence[str], ranks: int | None, env: Mapping[str, str]) -> Command:
    words = [_find("srun"), "--kill-on-bad-exit=1"]
    if "SLURM_CPUS_PER_TASK" in env:  # srun does not take it over from the batch job
        words += ["--cpus-per-task", env["SLURM_CPUS_PER_TASK"]]
    if ranks is not None:
        words += ["--ntasks-per-node", str(ranks)]
    tries = int(env.get("SLURM_RESTART_COUNT", 0))
    # Of its own for every job and every try: a port that was just in use is not free at once.
    port = 20000 + (int(env["SLURM_JOB_ID"]) + 7919 * tries) % 12000
    rendezvous = {
        "MASTER_ADDR": env.get("MASTER_ADDR") or _first_node(env),
        "MASTER_PORT": env.get("MASTER_PORT") or str(port),
    }
    return Command((*words, sys.executable, str(TRAIN), *settings), rendezvous)


def _first_node(env: Mapping[str, str]) -> str:
    """Address of the allocation's first node: a node's name need not be a host's."""
    names = _scontrol("show", "hostnames", env["SLURM_JOB_NODELIST"]).split()
    told = _scontrol("show", "node", names[0], "--oneliner")
    found = [word.partition("=")[2] for word in told.split() if word.startswith("NodeAddr=")]
    return found[0] if found else names[0]


def _scontrol(*words: str) -> str:
    result = subprocess.run([_find("scontrol"), *words], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"scontrol {' '.join(words)}: {result.stderr.strip()}")
    return result.stdout


def _find(name: str) -> str:
    """A program beside this interpreter, else on the PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise UserError(f"the program {name} is not found beside {sys.executable} or on the PATH")
    return found
