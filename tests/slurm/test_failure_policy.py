"""What slurm/common.sh makes of a step's end, on a real Slurm, with shell scripts for ranks."""

import json
import os
import time
from pathlib import Path

import pytest
from slurm.clusters import ROOT, Cluster, step_daemons, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

NODES = 3

RANK = """\
#!/bin/bash
# In place of python: a rank in its own folder, as far as the batch script sees one.
if [ "$1" = -m ]; then echo probed; exit "${PROBE_STATUS-0}"; fi
start=${SLURM_RESTART_COUNT-0}
tell() { if [ "$SLURM_PROCID" = 0 ]; then echo "$1" >> "$ELIP_BEAT_FILE"; fi; }
progress() {    # to a checkpoint, which all wait for
    if [ "$SLURM_PROCID" = 0 ]; then echo "step-$start" > run/ckpt/latest; fi
    until grep -qx "step-$start" run/ckpt/latest; do sleep 0.1; done
}
mkdir -p run/ckpt
tell "$PWD/run"
tell "$(cat run/ckpt/latest 2> /dev/null || echo none)"
"""


class Jobs:
    """slurm/pretrain_4m.sh in a folder where python is a shell script."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "slurm").symlink_to(ROOT / "slurm")
        (folder / "bin").mkdir()

    def submit(self, rank: str, *options: str, **environ: str) -> str:
        """rank: what each rank does, in shell, with `progress` and `tell done` for words."""
        python = self.folder / "bin" / "python"
        python.write_text(RANK + rank)
        python.chmod(0o755)
        path = f"{python.parent}:{os.environ['PATH']}"
        words = ("--time=5", "--output=job.log", *options, "slurm/pretrain_4m.sh")
        environ = {"PATH": path, "LINGER_SECONDS": "1"} | environ
        return self.cluster.submit(*words, cwd=self.folder, **environ)

    def end(self, job: str) -> tuple[str, str]:
        """Its state and exit status."""
        facts = self.cluster.wait_for(job, "COMPLETED", "FAILED")
        return facts["JobState"], facts["ExitCode"]

    @property
    def log(self) -> str:
        return (self.folder / "job.log").read_text()


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path) -> Jobs:
    return Jobs(cluster, tmp_path)


def test_a_failure_before_any_checkpoint_keeps_its_status(jobs: Jobs):
    job = jobs.submit("exit 7")
    assert jobs.end(job) == ("FAILED", "7:0")
    assert jobs.log.count("not starting again") == 1 and jobs.log.count("probed") == 2


def test_a_refusal_is_not_tried_again_whatever_was_saved(jobs: Jobs):
    assert jobs.end(jobs.submit("progress; exit 2")) == ("FAILED", "2:0")


def test_a_probe_that_fails_ends_the_job_with_its_status(jobs: Jobs):
    job = jobs.submit("tell done", PROBE_STATUS="10")
    assert jobs.end(job) == ("FAILED", "10:0")
    assert not (jobs.folder / "run").exists()


def test_after_a_checkpoint_it_starts_again_without_the_node_that_failed(jobs: Jobs):
    """And not for ever."""
    rank = "progress; if [ $SLURM_PROCID = 1 ]; then kill -9 $$; fi; sleep 2; exit 1"
    job = jobs.submit(rank, MAX_TRIES="2", EXCLUDE_AFTER="1")
    wait_until(lambda: jobs.cluster.facts(job)["ExcNodeList"] == "n2", "n2 excluded")
    jobs.cluster.start_again(job)
    assert jobs.end(job) == ("FAILED", "137:0")
    facts = jobs.cluster.facts(job)
    assert (facts["Restarts"], facts["NodeList"]) == ("1", "n[1,3]")
    failures = (jobs.folder / "run" / f"failures-{job}").read_text().splitlines()
    assert [line.split()[0] for line in failures] == ["n2", "n3"]
    assert "n2 failed first" in jobs.log and "2 times by now" in jobs.log
    assert jobs.log.count("probed") == 2  # at the first start only


def test_a_start_that_gets_no_further_is_tried_again_but_not_for_ever(jobs: Jobs):
    """A node may be bad, which nothing but another start tells from a step that always fails."""
    rank = "if [ $start = 0 ]; then progress; fi; exit 9"
    job = jobs.submit(rank, STUCK_AFTER="3", EXCLUDE_AFTER="9")
    for restart in ("1", "2"):
        jobs.cluster.start_again(job, restart)
    assert jobs.end(job) == ("FAILED", "9:0")
    assert jobs.cluster.facts(job)["Restarts"] == "2"
    assert "for the 3. time from step-0: not starting again" in jobs.log


def test_a_refusal_of_a_start_after_one_that_was_not_refused_may_pass(jobs: Jobs):
    rank = """
        case $start in 0) progress; tell stopped ;; 1) exit 2 ;; 2) exit 14 ;; *) tell done ;; esac
    """
    job = jobs.submit(rank, EXCLUDE_AFTER="1")
    for restart in ("1", "2", "3"):
        jobs.cluster.start_again(job, restart)
    assert jobs.end(job) == ("COMPLETED", "0:0")
    assert jobs.cluster.facts(job)["ExcNodeList"] == "(null)"  # all were refused alike


def test_no_node_is_left_out_where_too_few_would_be_left(jobs: Jobs):
    """Slurm would hold the job for good."""
    rank = "if [ $start = 0 ]; then progress; exit 9; fi; tell done"
    job = jobs.submit(rank, "--nodes=3", EXCLUDE_AFTER="1")
    jobs.cluster.start_again(job)
    assert jobs.end(job) == ("COMPLETED", "0:0")
    assert jobs.cluster.facts(job)["ExcNodeList"] == "(null)"
    assert "has too few others" in jobs.log


def test_of_ranks_that_gave_a_collective_up_none_is_to_blame(jobs: Jobs):
    """The first to end are those that were well, and waited."""
    said = "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5)"
    rank = f"if [ $start = 0 ]; then progress; echo '{said}' >&2; exit 9; fi; tell done"
    job = jobs.submit(rank, EXCLUDE_AFTER="1")
    jobs.cluster.start_again(job)
    assert jobs.end(job) == ("COMPLETED", "0:0")
    assert jobs.cluster.facts(job)["ExcNodeList"] == "(null)"
    assert (jobs.folder / "run" / f"failures-{job}").read_text().startswith("unknown ")


def test_the_words_of_a_container_stand_before_each_rank(jobs: Jobs):
    job = jobs.submit("echo wrapped by $IMAGE; tell done", WRAP="env IMAGE=mine.sif")
    assert jobs.end(job) == ("COMPLETED", "0:0")
    assert "wrapped by mine.sif" in jobs.log


def test_the_sites_lines_may_read_what_is_not_set_and_bring_a_python(jobs: Jobs):
    """As module functions and conda's hooks do; .venv's is the one, as in `make train`."""
    folder = jobs.folder
    (folder / "slurm").unlink()
    (folder / "slurm").mkdir()
    for name in ("common.sh", "pretrain_4m.sh"):
        (folder / "slurm" / name).symlink_to(ROOT / "slurm" / name)
    (folder / "slurm" / "site.env").write_text(
        f'echo "site $NOT_SET"; export PATH="{folder}/modules:$PATH"\n'
    )
    (folder / "modules").mkdir()
    (folder / "modules" / "python").symlink_to("/bin/false")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(folder / "bin")
    job = jobs.submit("tell done")
    assert jobs.end(job) == ("COMPLETED", "0:0"), jobs.log


def test_a_rank_that_hangs_is_ended(jobs: Jobs):
    rank = "progress; if [ $start = 0 ]; then sleep 300; fi; tell done"
    job = jobs.submit(rank, STALL_SECONDS="2")
    jobs.cluster.start_again(job)
    assert jobs.end(job) == ("COMPLETED", "0:0")
    assert "nothing from rank 0 for" in jobs.log and "start 1 of" in jobs.log


def test_ranks_that_slurm_has_lost_end_the_job_by_what_they_told(jobs: Jobs):
    """srun never hears of the end of a step whose daemons were killed."""
    job = jobs.submit("touch here-$SLURM_PROCID; sleep 3; tell done")
    wait_until(lambda: len(list(jobs.folder.glob("here-*"))) == 2, "two ranks")
    for daemon in step_daemons(job):
        daemon.kill()
    assert jobs.end(job) == ("COMPLETED", "0:0")


def test_a_suspended_job_has_not_stalled(jobs: Jobs):
    job = jobs.submit("touch here; sleep 2; tell done", STALL_SECONDS="4")
    wait_until((jobs.folder / "here").exists, "a rank")
    jobs.cluster.ask("scontrol", "suspend", job)
    suspended = time.monotonic()
    wait_until(lambda: time.monotonic() > suspended + 6, "longer than a stall")
    jobs.cluster.ask("scontrol", "resume", job)
    assert jobs.end(job) == ("COMPLETED", "0:0")
    assert "nothing from rank 0 for" not in jobs.log


def test_where_a_job_may_not_be_requeued_it_says_so_and_leaves_with_75(jobs: Jobs):
    job = jobs.submit("tell stopped", "--no-requeue")
    assert jobs.end(job) == ("FAILED", "75:0")
    assert jobs.log.count("submit it again") == 1


def test_where_memory_ran_out_it_starts_again_without_a_checkpoint(jobs: Jobs):
    """A smaller micro-batch may do; not where the user has given one."""
    rank = """
        if [ $start = 1 ]; then tell done; exit; fi
        mkdir -p run/memory; echo "$RECORD" > run/memory/oom-$SLURM_PROCID.json; exit 77
    """
    found, given = (json.dumps({"rank": 0, "fingerprints": keys}) for keys in (["a"], []))
    job = jobs.submit(rank, EXCLUDE_AFTER="1", RECORD=found)
    jobs.cluster.start_again(job)
    assert jobs.end(job) == ("COMPLETED", "0:0")
    assert (jobs.folder / "run" / f"failures-{job}").read_text().startswith("memory ")
    assert jobs.cluster.facts(job)["ExcNodeList"] == "(null)"
    job = jobs.submit(rank, RECORD=given)
    assert jobs.end(job) == ("FAILED", "77:0")


def test_what_the_kernel_ended_for_want_of_memory_is_told(jobs: Jobs):
    """As Slurm says it where the site bounds a job's memory (ConstrainRAMSpace)."""
    job = jobs.submit(
        "echo 'slurmstepd: error: Detected 1 oom_kill event in StepId=1.0.' >&2; kill -KILL $$"
    )
    assert jobs.end(job)[0] == "FAILED"
    assert "ask for more memory, or lower data.workers" in jobs.log


def test_a_sweep_without_a_line_for_an_element_trains_nothing(jobs: Jobs):
    (jobs.folder / "sweep.txt").write_text("run.name=a\n")
    array = jobs.submit("touch trained", "--array=2-2", SWEEP="sweep.txt")
    assert jobs.end(f"{array}_2") == ("FAILED", "2:0")
    assert "sweep.txt has no line 2" in jobs.log and not (jobs.folder / "trained").exists()


def test_one_element_of_an_array_is_started_again_alone(jobs: Jobs):
    """The last one has the array's own number."""
    (jobs.folder / "sweep.txt").write_text("run.name=a\n'run.name=b c'\n")
    rank = """
        echo "$SLURM_ARRAY_TASK_ID ${!#}" >> seen-$SLURM_PROCID
        if [ $SLURM_ARRAY_TASK_ID = 2 ] && [ $start = 0 ]; then tell stopped
        else tell done; fi
    """
    array = jobs.submit(rank, "--array=1-2%1", "--output=job-%a.log", SWEEP="sweep.txt")
    jobs.cluster.start_again(f"{array}_2")
    assert jobs.end(f"{array}_2") == ("COMPLETED", "0:0")
    assert jobs.end(f"{array}_1") == ("COMPLETED", "0:0")
    seen = (jobs.folder / "seen-0").read_text().splitlines()
    assert seen == ["1 run.name=a", "2 run.name=b c", "2 run.name=b c"]


def test_a_partition_that_is_not_there_is_refused_by_sbatch(jobs: Jobs):
    with pytest.raises(AssertionError, match="invalid partition specified: gpu"):
        jobs.submit("tell done", "--partition=gpu")
