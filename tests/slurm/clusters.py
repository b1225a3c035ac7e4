"""A real Slurm on this machine, by the tool that people use, for a module's tests."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
DEADLINE = 60
"Seconds that Slurm may take for anything on a loaded machine."
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def local_slurm(verb: str, folder: Path, *options: str) -> subprocess.CompletedProcess:
    """python tools/local_slurm, as typed."""
    command = [sys.executable, str(ROOT / "tools" / "local_slurm"), verb, "--dir", str(folder)]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=DEADLINE)


def wait_until(ready: Callable[[], object], what: str, seconds: float = DEADLINE) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.05)


@dataclass
class Cluster:
    """Nodes n1, n2, ..., each with all CPUs of this machine."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """What a shell has that evaluated what `up` prints, in an active environment."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def ask(self, *command: str, cwd: Path | None = None, **environ: str) -> str:
        """What a program of Slurm prints; it must leave with status 0."""
        env = self.env | environ
        done = subprocess.run(
            command, env=env, cwd=cwd, capture_output=True, text=True, timeout=DEADLINE
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, *words: str, cwd: Path, **environ: str) -> str:
        """sbatch, in a folder, with these variables besides. Returns the job's number."""
        return self.ask("sbatch", "--parsable", *words, cwd=cwd, **environ).strip()

    def facts(self, job: str) -> dict[str, str]:
        """What scontrol says of a job: JobState, ExitCode, Restarts, ..."""
        words = self.ask("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start_again(self, job: str, restart: str = "1", seconds: float = DEADLINE) -> None:
        """Once a job has been requeued so often, start it; Slurm would let it wait two minutes.

        Not within the second in which it was stopped: the nodes refuse a credential of that second,
        and the job fails ("Job credential revoked" in slurmctld.log).
        """

        def requeued() -> bool:
            facts = self.facts(job)
            assert facts["JobState"] not in ENDED, f"job {job} ended instead: {self.said(job)}"
            return (facts["JobState"], facts["Restarts"]) == ("PENDING", restart)

        wait_until(requeued, f"job {job} requeued", seconds)
        self.ask("scontrol", "update", f"JobId={job}", "StartTime=now+2")

    def said(self, job: str) -> str:
        """The end of what a job has written."""
        return Path(self.facts(job)["StdOut"]).read_text()[-3000:]

    def wait_for(self, job: str, *states: str, seconds: float = DEADLINE) -> dict[str, str]:
        wait_until(lambda: self.facts(job)["JobState"] in states, f"job {job}: {states}", seconds)
        return self.facts(job)


def need_slurm() -> None:
    """Skip where Slurm is not installed, or is that of a cluster; but never in CI."""
    reason = ""
    if not shutil.which("slurmctld", path=os.environ["PATH"] + ":/usr/sbin:/sbin"):
        reason = "Slurm is not installed: apt-get install --no-install-recommends slurm-wlm munge"
    elif Path("/etc/slurm/slurm.conf").exists():
        reason = "/etc/slurm/slurm.conf: the machine belongs to a cluster"
    if reason and os.environ.get("CI"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Cluster]:
    """Up before a module's first test, down after its last: two of them would refuse each other.

    It has two nodes, or as many as the module's NODES says, and the module's LINES in slurm.conf.
    """
    need_slurm()
    folder = tmp_path_factory.mktemp("slurm") / "c"
    lines = [word for line in getattr(request.module, "LINES", ()) for word in ("--line", line)]
    nodes = str(getattr(request.module, "NODES", 2))
    started = local_slurm("up", folder, "--nodes", nodes, *lines)
    assert started.returncode == 0, started.stderr
    yield Cluster(folder)
    ended = local_slurm("down", folder)
    assert ended.returncode == 0, ended.stderr


def step_daemons(job: str, node: str = "") -> list[psutil.Process]:
    """The slurmstepd of a job's first steps on a node, or on all; not the one of its script."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if process.info["name"] == "slurmstepd" and re.search(rf"\[{job}\.\d+\]", words):
            tasks = process.children()
            if tasks and tasks[0].environ().get("SLURMD_NODENAME", "").endswith(node):
                found.append(process)
    return found
