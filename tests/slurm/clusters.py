"""A real Slurm on this machine, by the tool that people use, for a module's tests."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEADLINE = 60
"Seconds that Slurm may take for anything on a loaded machine."


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
    """Two nodes, n1 and n2, each with all CPUs of this machine."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """What a shell has that evaluated what `up` prints, in an active environment."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def ask(self, *command: str, cwd: Path | None = None) -> str:
        """What a program of Slurm prints; it must leave with status 0."""
        done = subprocess.run(
            command, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=DEADLINE
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, *words: str, cwd: Path) -> str:
        """sbatch, in a folder. Returns the job's number."""
        return self.ask("sbatch", "--parsable", *words, cwd=cwd).strip()

    def facts(self, job: str) -> dict[str, str]:
        """What scontrol says of a job: JobState, ExitCode, Restarts, ..."""
        words = self.ask("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start_again(self, job: str) -> None:
        """Start a requeued job, which Slurm would let wait for two minutes.

        Not within the second in which it was stopped: the nodes refuse a credential of that second,
        and the job fails ("Job credential revoked" in slurmctld.log).
        """
        self.wait_for(job, "PENDING")
        self.ask("scontrol", "update", f"JobId={job}", "StartTime=now+2")

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
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Up before a module's first test, down after its last: two of them would refuse each other."""
    need_slurm()
    folder = tmp_path_factory.mktemp("slurm") / "c"
    started = local_slurm("up", folder, "--nodes", "2")
    assert started.returncode == 0, started.stderr
    yield Cluster(folder)
    ended = local_slurm("down", folder)
    assert ended.returncode == 0, ended.stderr
