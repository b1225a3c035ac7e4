"""Real runs of elip_ds/train.py: real DeepSpeed, real gloo ranks, real processes to kill."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_words

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "elip_ds" / "train.py"
DEADLINE = 240
"Seconds that a run of a tiny model may take on a loaded machine."


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Job:
    """The ranks of one started run. output: what they wrote, once finished."""

    dir: Path
    ranks: list[subprocess.Popen]
    output: list[str] = field(default_factory=list)

    def finish(self, *, ok: bool = True) -> "Job":
        """Wait for all ranks; with ok, each must have left with status 0."""
        self.output = [rank.communicate(timeout=DEADLINE)[0] for rank in self.ranks]
        if ok:
            assert self.codes == [0] * len(self.ranks), "\n".join(o[-3000:] for o in self.output)
        return self

    @property
    def codes(self) -> list[int]:
        return [rank.returncode for rank in self.ranks]

    def kill(self, *which: int) -> None:
        for i in which or range(len(self.ranks)):
            self.ranks[i].send_signal(signal.SIGKILL)

    def lines(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds now."""
        path = self.dir / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def losses(self) -> dict[int, dict[str, float]]:
        """step -> losses."""
        return {line["step"]: line["losses"] for line in self.lines() if "losses" in line}

    def wait_for(self, ready: Callable[[], object], what: str) -> None:
        """Poll until ready() holds. Fails when the ranks end before, or too late."""
        end = time.time() + DEADLINE
        while not ready():
            assert time.time() < end, f"{what}: not within {DEADLINE} s"
            if any(rank.poll() not in (None, 0) for rank in self.ranks):
                pytest.fail(f"{what}: a rank ended\n" + "\n".join(self.finish(ok=False).output))
            time.sleep(0.002)

    def newest(self) -> Path:
        return sorted((self.dir / "ckpt").glob("step-*"))[-1]


@pytest.fixture(scope="module")
def start(
    tmp_path_factory: pytest.TempPathFactory, shared_scenes: Path
) -> Iterator[Callable[..., Job]]:
    """start(name, *words, ranks=2, json="z2", model="albef") -> Job: a tiny run, no launcher.

    The same name is the same run folder for all tests of a module. environ: of each rank, besides.
    """
    jobs: list[Job] = []
    tmp_path = tmp_path_factory.mktemp("runs")

    def start_job(
        name: str,
        *words: str,
        ranks: int = 2,
        json: str = "z2",
        model: str = "albef",
        environ: Sequence[dict[str, str]] = (),
    ) -> Job:
        port = str(free_port())
        command = [sys.executable, str(TRAIN), "--deepspeed", str(ROOT / f"ds_configs/{json}.json")]
        command += [*tiny_words(model=model), f"data.builtin.dir={shared_scenes}"]
        command += [f"run.dir={tmp_path}", f"run.name={name}", "engine.precision=fp32", *words]
        processes = []
        for rank in range(ranks):
            env = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
                "COLUMNS": "200",
            }
            env |= environ[rank] if environ else {}
            processes.append(
                subprocess.Popen(
                    command,
                    env=env,
                    cwd=tmp_path,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            )
        jobs.append(Job(tmp_path / name, processes))
        return jobs[-1]

    yield start_job
    for job in jobs:
        for rank in job.ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
            if rank.stdout:
                rank.stdout.close()


@pytest.fixture(scope="session")
def shared_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the built-in scenes of all runs of a session are."""
    return tmp_path_factory.mktemp("scenes")
