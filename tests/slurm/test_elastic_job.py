"""One run on two nodes, then on one, then on two again, as jobs of a real Slurm."""

import json
from pathlib import Path

import pytest
from slurm.clusters import Cluster
from slurm.test_pretrain_script import TRAINS_SECONDS, losses_of, submit, wait_for_step

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

# 60 steps: ITM is off, as its negatives depend on the split over ranks.
WORDS = (
    *("schedule.length=480 samples", "checkpoint.every=80 samples", "objectives.itm=null"),
    *("run.on_finish=nothing", "metrics.every=8 samples"),
)


def train_until(
    cluster: Cluster, folder: Path, words: tuple[str, ...], *, nodes: int, step: int | None
) -> None:
    """Submit the run on so many nodes; past a step ask it to stop, or let it come to its end."""
    asked = (f"--nodes={nodes}", "--ntasks-per-node=1")
    job = submit(cluster, folder, *words, options=asked)
    if step is not None:
        wait_for_step(folder / "tiny", step)
        cluster.ask("scancel", "--batch", "--signal=USR2", job)
    ended = ("COMPLETED", "FAILED") if step is None else ("PENDING", "COMPLETED", "FAILED")
    facts = cluster.wait_for(job, *ended, seconds=TRAINS_SECONDS)
    assert facts["JobState"] != "FAILED", (folder / "job.log").read_text()
    if facts["JobState"] == "PENDING":  # it would start again as it was
        cluster.ask("scancel", job)


def test_a_run_goes_from_two_nodes_to_one_and_back(
    cluster: Cluster, tmp_path: Path, shared_scenes: Path, start
):
    words = (*WORDS, f"data.builtin.dir={shared_scenes}")
    train_until(cluster, tmp_path, words, nodes=2, step=5)
    train_until(cluster, tmp_path, words, nodes=1, step=20)
    train_until(cluster, tmp_path, words, nodes=2, step=None)
    log = (tmp_path / "job.log").read_text()
    assert "world_size 2 -> 1" in log and "world_size 1 -> 2" in log
    lines = [json.loads(x) for x in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    seen = [line["samples_seen"] for line in lines if "losses" in line]
    assert seen == list(range(8, 488, 8))  # the same global batch throughout
    whole = start("whole", *WORDS).finish()
    found, expected = losses_of(tmp_path / "tiny"), whole.losses()
    assert found.keys() == expected.keys()
    for step, losses in expected.items():
        assert found[step] == pytest.approx(losses, rel=1e-4)
