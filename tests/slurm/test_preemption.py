"""A job that has to make room for a more urgent one, on a real Slurm that preempts."""

from collections.abc import Callable
from pathlib import Path

import pytest
from end_to_end.jobs import Job
from slurm.clusters import Cluster
from slurm.test_pretrain_script import TRAINS_SECONDS, losses_of, submit, wait_for_step

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

LINES = (
    *("PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE"),
    "SlurmctldParameters=preempt_send_user_signal",
    "PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60",
    "PartitionName=urgent Nodes=ALL PriorityTier=9 PreemptMode=OFF",
)


def test_a_preempted_job_saves_makes_room_and_goes_on(
    cluster: Cluster, tmp_path: Path, shared_scenes: Path, start: Callable[..., Job]
):
    words = ["schedule.length=1600 samples", "checkpoint.every=9999 samples"]
    words += ["batching.micro_batch_size=4", "run.on_finish=nothing"]
    options = ("--partition=low",)
    job = submit(cluster, tmp_path, f"data.builtin.dir={shared_scenes}", *words, options=options)
    wait_for_step(tmp_path / "tiny", 12)
    urgent = cluster.submit(
        "--nodes=2", "--exclusive", "--partition=urgent", "--wrap=sleep 1", cwd=tmp_path
    )
    facts = cluster.wait_for(urgent, "COMPLETED", "FAILED", seconds=TRAINS_SECONDS)
    assert facts["JobState"] == "COMPLETED"
    log = tmp_path / "job.log"
    assert "asking the ranks to save" in log.read_text(), log.read_text()
    cluster.start_again(job)
    facts = cluster.wait_for(job, "COMPLETED", "FAILED", seconds=TRAINS_SECONDS)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    assert losses_of(tmp_path / "tiny") == start("whole", *words).finish().losses()
