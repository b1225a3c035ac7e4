"""slurm/pretrain_4m.sh on two nodes of a real Slurm."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny_words
from end_to_end.jobs import Job
from slurm.clusters import ROOT, Cluster, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

TRAINS_SECONDS = 240
"Two ranks start and train a tiny model, on a machine with other work."


def submit(
    cluster: Cluster,
    folder: Path,
    *words: str,
    options: tuple[str, ...] = (),
    script: str = "slurm/pretrain_4m.sh",
) -> str:
    """The script as people submit it, in the repository's folder. Returns the job's number."""
    words = (*tiny_words(), f"run.dir={folder}", "run.name=tiny", "engine.precision=fp32", *words)
    options = ("--time=30", f"--output={folder}/job.log", *options)
    return cluster.submit(*options, script, *words, cwd=ROOT)


def wait_for_step(run: Path, step: int) -> None:
    """Until a run has done it."""
    metrics = run / "metrics.jsonl"
    wait_until(
        lambda: metrics.exists() and f'"step": {step}' in metrics.read_text(),
        f"step {step}",
        TRAINS_SECONDS,
    )


def losses_of(run: Path) -> dict[int, dict[str, float]]:
    """step -> losses. A step that was done twice would be there twice, which fails here."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "losses" in line]
    assert steps == sorted(set(steps))
    return {line["step"]: line["losses"] for line in lines if "losses" in line}


def test_it_trains_on_two_nodes_and_saves(cluster: Cluster, tmp_path: Path, shared_scenes: Path):
    job = submit(cluster, tmp_path, f"data.builtin.dir={shared_scenes}")
    facts = cluster.wait_for(job, "COMPLETED", "FAILED", seconds=TRAINS_SECONDS)
    log = (tmp_path / "job.log").read_text()
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert log.count("start 0 of job") == 2  # the probe, and the training
    assert "2 tasks on n[1-2]" in log
    assert json.loads((tmp_path / "tiny" / "summary.json").read_text())["world_size"] == 2
    assert list(losses_of(tmp_path / "tiny")) == list(range(1, 9))
    assert (tmp_path / "tiny/ckpt/step-00000008/meta.json").exists()


def test_the_plan_script_measures_what_fits_and_trains_nothing(cluster: Cluster, tmp_path: Path):
    words = ("batching.device_memory=cpu:1GiB", "batching.global_batch_size=64")
    job = submit(cluster, tmp_path, *words, script="slurm/plan.sh")
    facts = cluster.wait_for(job, "COMPLETED", "FAILED", seconds=TRAINS_SECONDS)
    log = (tmp_path / "job.log").read_text()
    assert facts["ExitCode"] == "0:0", log
    assert "micro-batch 32 x accumulation 1 x 2 ranks = 64" in log and "(measured" in log
    made = sorted(path.name for path in (tmp_path / "tiny").glob("p*"))
    assert made == ["plan.json", "probe", "probe-1"]  # each node has probed in its own


def test_a_setting_that_does_not_fit_fails_the_job_with_one_line(cluster: Cluster, tmp_path: Path):
    job = submit(cluster, tmp_path, "optim.lr=fast")
    facts = cluster.wait_for(job, "COMPLETED", "FAILED", seconds=TRAINS_SECONDS)
    assert facts["ExitCode"] == "2:0"
    lines = (tmp_path / "job.log").read_text().splitlines()
    assert len([line for line in lines if "optim.lr" in line]) == 1, lines


def test_ahead_of_the_time_limit_it_saves_and_starts_again_where_it_was(
    cluster: Cluster, tmp_path: Path, shared_scenes: Path, start: Callable[..., Job]
):
    """The signal is the one that --signal=B:USR2 sends; a real limit would take minutes."""
    words = ["schedule.length=1600 samples", "checkpoint.every=400 samples"]
    job = submit(cluster, tmp_path, f"data.builtin.dir={shared_scenes}", *words)
    log = tmp_path / "job.log"
    wait_for_step(tmp_path / "tiny", 12)
    cluster.ask("scancel", "--batch", "--signal=USR2", job)
    wait_until(lambda: "is there: saving" in log.read_text(), "ranks that save", TRAINS_SECONDS)
    cluster.ask("scancel", "--batch", "--signal=USR2", job)
    cluster.start_again(job)
    facts = cluster.wait_for(job, "COMPLETED", "FAILED", seconds=TRAINS_SECONDS)
    said = log.read_text()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), said
    assert "asking the ranks to save" in said and "resumed" in said and "start 1 of job" in said
    whole = start("whole", *words).finish()
    assert losses_of(tmp_path / "tiny") == whole.losses()
