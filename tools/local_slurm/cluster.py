"""A throw-away Slurm: its folder, its daemons, and how to end all of it.

One munged, one slurmctld and a slurmd for each node, all on this machine, with ports, key and state
of their own; everything they write is in one folder. Nothing is shared with a Slurm or munged that
this machine may have: a munged of the distribution goes on beside ours, and a Slurm is a refusal.
"""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from elip_ds.errors import UserError

DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENTS = ("slurmstepd", "srun", "salloc", "sbatch")
SYSTEM_CONFIGS = (Path("/etc/slurm/slurm.conf"), Path("/etc/slurm-llnl/slurm.conf"))
MARK = "# A throw-away cluster of tools/local_slurm; `down` removes this folder.\n"
READY_SECONDS = 30
"Until all nodes are idle, or all processes are gone; a tenth of a second where nothing else runs."

# Containers have no cgroups to give away: processes are tracked by their parents, and not bound.
# More CPUs than the machine has would drain a node but for config_overrides. NodeAddr spares the
# names n1, n2, ... an entry in anyone's hosts.
CONFIG = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=5,sched_interval=5,batch_sched_delay=0
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=5
SlurmdTimeout=15
JobRequeue=1
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus}\n"
PARTITION = "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"


@dataclass(frozen=True)
class Process:
    """name: as the kernel has it, at most 15 characters.  environ: () where it may not be read."""

    pid: int
    parent: int
    name: str
    words: tuple[str, ...]
    environ: tuple[str, ...]


def default_folder() -> Path:
    """One for each user."""
    return Path(os.environ.get("XDG_RUNTIME_DIR", "/tmp")) / f"local_slurm-{os.getuid()}"


def start_cluster(folder: Path, nodes: int, lines: Sequence[str] = ()) -> Path:
    """Start a cluster of nodes n1, n2, ... and wait until all are idle. Returns its slurm.conf.

    lines: what slurm.conf shall hold besides.

    Raises UserError where Slurm is missing, where there is a cluster already, and where a daemon
    does not start, of which then nothing is left.
    """
    programs = _find_programs()
    _refuse_others(folder)
    try:
        folder.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise UserError(f"--dir {folder}: cannot be made: {error.strerror}") from None
    conf = folder / "slurm.conf"
    try:
        names = _write_config(conf, nodes, lines)
        _start_daemons(programs, conf, names)
        _wait_until_idle(conf, names)
    except BaseException:
        end_processes(folder)
        shutil.rmtree(folder)
        raise
    return conf


def stop_cluster(folder: Path) -> None:
    """End every process of a cluster, those of its jobs too, and remove the folder.

    Raises UserError where the folder is none of ours.
    """
    conf_of(folder)
    end_processes(folder)
    shutil.rmtree(folder)


def conf_of(folder: Path) -> Path:
    """The slurm.conf of a cluster of ours. Raises UserError where there is none."""
    conf = folder / "slurm.conf"
    if not conf.is_file() or not conf.read_text().startswith(MARK):
        raise UserError(f"--dir {folder}: no cluster of tools/local_slurm is there; `up` makes one")
    return conf


def end_processes(folder: Path) -> None:
    """Kill daemons and jobs, and again what they have started meanwhile, until none is left."""
    end = time.monotonic() + READY_SECONDS
    while found := _processes_of(folder):
        if time.monotonic() > end:
            left = ", ".join(f"{x.name} {x.pid}" for x in found)
            raise UserError(f"--dir {folder}: cannot end {left}")
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.02)


def running_processes() -> Iterator[Process]:
    """All of this machine, without those that have ended and wait for their parents to ask."""
    for path in Path("/proc").glob("[0-9]*"):
        words = _strings(path / "cmdline")
        if words:
            with suppress(OSError):  # it ended meanwhile
                # "12 (name) S 3 ...": the state and the parent follow the name's bracket.
                head, _, tail = (path / "stat").read_text().rpartition(")")
                name, parent = head.partition("(")[2], int(tail.split()[1])
                yield Process(int(path.name), parent, name, words, _strings(path / "environ"))


def _strings(path: Path) -> tuple[str, ...]:
    try:
        return tuple(os.fsdecode(x) for x in path.read_bytes().split(b"\0") if x)
    except OSError:
        return ()


def _processes_of(folder: Path) -> list[Process]:
    """With the children of daemons, of which slurmctld has one without words of its own."""
    running = [x for x in running_processes() if x.pid != os.getpid()]
    own = {x.pid for x in running if _belongs(x, folder)}
    return [x for x in running if x.pid in own or x.parent in own]


def _belongs(process: Process, folder: Path) -> bool:
    """A daemon or a program of Slurm started on the folder, or what a daemon started for a job.

    A shell in which SLURM_CONF was exported, and its children, are none: slurmd alone names a node.
    """
    conf = str(folder / "slurm.conf")
    if process.name in DAEMONS:
        return conf in process.words or f"--socket={folder}/munge.socket" in process.words
    of_job = any(x.startswith("SLURMD_NODENAME=") for x in process.environ)
    return f"SLURM_CONF={conf}" in process.environ and (of_job or process.name in CLIENTS)


def _find_programs() -> dict[str, str]:
    """Debian has the daemons where a user's PATH does not look."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    found = {name: shutil.which(name, path=path) for name in (*DAEMONS, "srun", "sinfo")}
    missing = [name for name, where in found.items() if where is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)} not found; "
            "apt-get install --no-install-recommends slurm-wlm munge has them"
        )
    return {name: where for name, where in found.items() if where}


def _refuse_others(folder: Path) -> None:
    """Raises UserError where a cluster is, or was meant to be."""
    if folder.exists():
        ours = (folder / "slurm.conf").exists()
        todo = "end the cluster in it by `down`" if ours else "name a folder that does not"
        raise UserError(f"--dir {folder} exists already; {todo}")
    for path in SYSTEM_CONFIGS:
        if path.exists():
            raise UserError(f"{path}: this machine belongs to a Slurm cluster; use that one")
    for process in running_processes():
        if process.name in ("slurmctld", "slurmd", "slurmdbd"):
            raise UserError(
                f"a Slurm is running here already ({process.name}, process {process.pid}); use it, "
                "or end it first: one of tools/local_slurm by `down`"
            )


def _write_config(conf: Path, nodes: int, lines: Sequence[str]) -> list[str]:
    """Write slurm.conf and the key; returns the names of the nodes."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise UserError(f"user {os.getuid()} has no name; Slurm wants an entry in passwd") from None
    host = socket.gethostname().split(".")[0]
    names = [f"n{i}" for i in range(1, nodes + 1)]
    port, *ports = _free_ports(1 + nodes)
    text = MARK + CONFIG.format(host=host, port=port, user=user, folder=conf.parent)
    for name, of_node in zip(names, ports, strict=True):
        text += NODE.format(name=name, host=host, port=of_node, cpus=os.cpu_count())
    conf.write_text(text + PARTITION + "".join(f"{line}\n" for line in lines))
    key = conf.parent / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    return names


def _free_ports(number: int) -> list[int]:
    """Ports that no one listens on now; all are held until the last is known."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _start_daemons(programs: dict[str, str], conf: Path, names: list[str]) -> None:
    """Each goes into the background by itself, once it has read its configuration."""
    folder = conf.parent
    (folder / "state").mkdir()
    munge = [
        *("--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"),
        *(f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log"),
        f"--seed-file={folder}/munged.seed",
    ]
    commands = [[programs["munged"], *munge], [programs["slurmctld"], "-c", "-f", str(conf)]]
    commands += [[programs["slurmd"], "-f", str(conf), "-N", name] for name in names]
    # A daemon keeps its directory and environment: neither may be the caller's, or what is said
    # there of another job would be said of all jobs.
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
    for command in commands:
        log = folder / f"{Path(command[0]).name}.out"
        with log.open("w") as output:
            status = subprocess.run(
                command,
                cwd=folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            ).returncode
        if status:
            said = log.read_text().strip().splitlines()
            raise UserError(f"{command[0]} does not start: {said[-1] if said else status}")


def _wait_until_idle(conf: Path, names: list[str]) -> None:
    end = time.monotonic() + READY_SECONDS
    states = ""
    while time.monotonic() < end:
        states = ask_slurm(conf, "sinfo", "--noheader", "--Node", "--format=%N %T")
        # A node is there once for each of its partitions.
        if list(dict.fromkeys(states.splitlines())) == [f"{name} idle" for name in names]:
            return
        time.sleep(0.05)
    last = (conf.parent / "slurmctld.log").read_text().strip().splitlines()[-1:]
    found = states.replace("\n", ", ") or "no answer"
    raise UserError(f"nodes are not idle in {READY_SECONDS} s: {found} {' '.join(last)}")


def ask_slurm(conf: Path, *command: str) -> str:
    """What a program of Slurm prints, of the cluster of this slurm.conf."""
    return subprocess.run(
        command,
        env=os.environ | {"SLURM_CONF": str(conf)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ).stdout
