"""What clusters do to jobs, done to real runs on a real Slurm: recovery, equal losses, one line."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import tiny_words
from end_to_end.jobs import Job
from slurm.clusters import ROOT, Cluster, step_daemons, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

NODES = 3
LENGTH = ("schedule.length=1200 samples", "checkpoint.every=80 samples")  # 150 steps
TRAINS_SECONDS = 240
"Two ranks start and train a tiny model, on a machine with other work."


class Runs:
    """slurm/pretrain_4m.sh on two of three nodes, with a tiny model."""

    def __init__(self, cluster: Cluster, folder: Path, scenes: Path) -> None:
        self.cluster, self.folder, self.scenes = cluster, folder, scenes
        self.run = folder / "tiny"

    def submit(self, *words: str, options: Sequence[str] = (), **environ: str) -> str:
        """The job's number. The micro-batch is given, so that no probe is started first."""
        words = (
            *(*tiny_words(), f"run.dir={self.folder}", "run.name=tiny", "engine.precision=fp32"),
            *(f"data.builtin.dir={self.scenes}", "batching.micro_batch_size=4", *LENGTH),
            *("run.on_finish=nothing", *words),
        )
        options = ("--time=30", f"--output={self.folder}/job.log", *options)
        environ = {"LINGER_SECONDS": "3", "DEEPSPEED": "ds_configs/z2.json"} | environ
        return self.cluster.submit(*options, "slurm/pretrain_4m.sh", *words, cwd=ROOT, **environ)

    @property
    def log(self) -> str:
        return (self.folder / "job.log").read_text()

    @property
    def steps(self) -> list[int]:
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [line["step"] for line in found if "losses" in line]

    def trains(self, step: int) -> None:
        """Wait until a step is done."""
        wait_until(lambda: max(self.steps, default=0) >= step, f"step {step}", TRAINS_SECONDS)

    def saves(self) -> None:
        """Wait until there is a newer checkpoint than now."""
        before = self.saved
        wait_until(lambda: self.saved > before, f"a checkpoint after {before}", TRAINS_SECONDS)

    @property
    def saved(self) -> int:
        """The step of the checkpoint that a failure would go on from; 0: there is none."""
        latest = self.run / "ckpt" / "latest"
        return int(latest.read_text().split("-")[-1]) if latest.exists() else 0

    def end(self, job: str) -> dict[str, str]:
        return self.cluster.wait_for(job, "COMPLETED", "FAILED", seconds=TRAINS_SECONDS)

    def losses(self) -> dict[int, dict[str, float]]:
        return Job(self.run, []).losses()

    def slurmd(self, node: str) -> psutil.Process | None:
        for process in psutil.process_iter(["name", "cmdline"]):
            words = process.info["cmdline"] or []
            ours = f"{self.cluster.folder}/slurm.conf" in words
            if process.info["name"] == "slurmd" and ours and words[-1] == node:
                return process
        return None

    def rank(self, job: str, node: str) -> psutil.Process:
        """The one on a node."""
        return step_daemons(job, node)[0].children()[0]


@pytest.fixture
def runs(cluster: Cluster, tmp_path: Path, shared_scenes: Path) -> Runs:
    return Runs(cluster, tmp_path, shared_scenes)


@pytest.fixture(scope="module")
def whole(start: Callable[..., Job]) -> Job:
    """The same run, without Slurm and not interrupted."""
    words = (*LENGTH, "run.on_finish=nothing", "batching.micro_batch_size=4")
    return start("whole", *words).finish()


@pytest.fixture
def nodes(cluster: Cluster, runs: Runs) -> Iterator[None]:
    """Brings back the nodes that a test kills."""
    yield
    for name in ("n1", "n2", "n3"):
        if runs.slurmd(name) is None:
            command = ["slurmd", "-f", f"{cluster.folder}/slurm.conf", "-N", name]
            subprocess.run(command, check=True, env=cluster.env)
    states = ["n1 idle", "n2 idle", "n3 idle"]
    wait_until(
        lambda: cluster.ask("sinfo", "-h", "-N", "-o", "%N %T").splitlines() == states, "nodes"
    )


def test_killed_ranks_and_step_daemons_cost_the_steps_since_the_last_checkpoint(
    runs: Runs, whole: Job
):
    """A rank of n2 first, then the step daemon of the node in its place."""
    job = runs.submit(EXCLUDE_AFTER="1")
    runs.saves()
    runs.rank(job, "n2").kill()
    runs.cluster.start_again(job, seconds=TRAINS_SECONDS)
    assert runs.cluster.facts(job)["ExcNodeList"] == "n2"
    runs.saves()
    step_daemons(job, "n3")[0].kill()
    runs.cluster.start_again(job, "2", seconds=TRAINS_SECONDS)
    assert json.loads((runs.run / "summary.json").read_text())["state"] == "stopped"
    facts = runs.end(job)
    assert (facts["JobState"], facts["NodeList"]) == ("COMPLETED", "n[1,3]"), runs.log
    assert "nobody asked" in runs.log
    assert runs.losses() == whole.losses()


def test_a_job_is_suspended_and_cancelled_and_the_next_one_loses_a_node(
    runs: Runs, whole: Job, nodes: None
):
    """Its slurmd, its step daemon and its rank at once, as when the power goes."""
    clock = ("checkpoint.every=9999 samples", "checkpoint.every_minutes=0.001")
    job = runs.submit(*clock)
    runs.trains(15)
    runs.cluster.ask("scontrol", "suspend", job)
    wait_until(lambda: not _grows(runs), "standstill")
    runs.cluster.ask("scontrol", "resume", job)
    runs.trains(25)
    runs.cluster.ask("scancel", job)
    runs.cluster.wait_for(job, "CANCELLED")
    assert "CANCELLED AT" in runs.log and "starting again" not in runs.log
    for checkpoint in (runs.run / "ckpt").glob("step-*"):
        assert (checkpoint / "meta.json").exists()
    job = runs.submit(*clock)
    runs.saves()
    slurmd = runs.slurmd("n2")
    assert slurmd is not None
    for process in (slurmd, step_daemons(job, "n2")[0], runs.rank(job, "n2")):
        process.kill()
    runs.cluster.start_again(job, seconds=TRAINS_SECONDS)
    facts = runs.end(job)
    assert (facts["JobState"], facts["NodeList"]) == ("COMPLETED", "n[1,3]"), runs.log
    assert runs.losses() == whole.losses()


def _grows(runs: Runs) -> bool:
    before, end = runs.steps, time.monotonic() + 0.5
    wait_until(lambda: runs.steps != before or time.monotonic() > end, "half a second")
    return runs.steps != before


@contextmanager
def mounted(disk: Path, options: str) -> Iterator[None]:
    """A small file system of its own."""
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(runs: Runs, whole: Job):
    disk = runs.folder / "disk"
    with mounted(disk, "size=8m"):
        runs.run = disk / "tiny"
        job = runs.submit(f"run.dir={disk}")
        first = runs.run / "ckpt" / "step-00000010"
        wait_until(first.is_dir, "the first checkpoint", TRAINS_SECONDS)
        (disk / "ballast").write_bytes(b"x" * max(0, shutil.disk_usage(disk).free - 200_000))
        wait_until(lambda: "checkpoint NOT saved" in runs.log, "a full disk", TRAINS_SECONDS)
        (disk / "ballast").unlink()
        assert runs.end(job)["JobState"] == "COMPLETED", runs.log
        assert not list((runs.run / "ckpt").glob(".step-*"))


def test_a_read_only_run_folder_is_one_line_and_status_2(runs: Runs):
    """A file system: root may write to every folder of others, whatever its mode."""
    disk = runs.folder / "disk"
    with mounted(disk, "ro"):
        facts = runs.end(runs.submit(f"run.dir={disk}", options=["--nodes=1"]))
        assert facts["ExitCode"] == "2:0", runs.log
        [line] = [line for line in runs.log.splitlines() if line.startswith("error: ")]
        assert "Read-only file system" in line


@pytest.mark.parametrize("what", ["a run folder that cannot be made", "data that are not there"])
def test_what_is_missing_is_one_line_and_status_2(what: str, runs: Runs):
    (runs.folder / "file").touch()
    words = {
        # Root may write to every folder, whatever its mode.
        "a run folder that cannot be made": f"run.dir={runs.folder}/file/runs",
        "data that are not there": f"data.train={runs.folder}/nowhere/train-*.tar",
    }
    facts = runs.end(runs.submit(words[what], options=["--nodes=1"]))
    assert facts["ExitCode"] == "2:0", runs.log
    assert len([line for line in runs.log.splitlines() if line.startswith("error: ")]) == 1
    assert not list(runs.folder.rglob("step-*"))


def test_a_chain_fine_tunes_then_converts_and_scores(runs: Runs, whole: Job):
    words = (*tiny_words(), f"run.dir={runs.folder}", f"data.builtin.dir={runs.scenes}")
    words = (*words, "engine.precision=fp32", "run.name=tuned", "run.on_finish=nothing")
    words = (*words, "batching.micro_batch_size=8", "optim.lr=1e-5")
    out = runs.folder / "tuned.pth"

    def submit(script: str, *more: str, after: str = "") -> str:
        options = ["--time=30", "--nodes=1", f"--output={runs.folder}/{script}.log"]
        options += [f"--dependency=afterok:{after}"] * bool(after)
        return runs.cluster.submit(*options, f"slurm/{script}.sh", *more, cwd=ROOT, **environ)

    environ = {"FROM": str(whole.dir)}
    tuned = submit("finetune", *words)
    conversion = ("--from", "elip_ds", str(runs.folder / "tuned"), "--to", "albef")
    converted = submit("convert", *conversion, "--out", str(out), after=tuned)
    scored = submit("eval", str(runs.folder / "tuned"), "--json", after=converted)
    facts = runs.end(scored)
    log = (runs.folder / "eval.log").read_text()
    assert facts["ExitCode"] == "0:0", log
    assert out.exists() and '"recall_at_1"' in log


def test_each_element_of_an_array_makes_shards_of_a_line(runs: Runs):
    lines = [
        f"scenes split={x} count=8 --out '{runs.folder}/s h' --prefix {x}" for x in ("train", "val")
    ]
    (runs.folder / "shards.txt").write_text("\n".join(lines))
    options = ("--array=1-2", "--time=5", f"--output={runs.folder}/%a.log", "--cpus-per-task=1")
    file = str(runs.folder / "shards.txt")
    array = runs.cluster.submit(*options, "slurm/shards.sh", file, cwd=ROOT)
    for element in (f"{array}_1", f"{array}_2"):
        assert runs.end(element)["ExitCode"] == "0:0", (runs.folder / "1.log").read_text()
    made = [path.name for path in (runs.folder / "s h").glob("*.tar")]
    assert sorted(made) == ["train-000000.tar", "val-000000.tar"]
