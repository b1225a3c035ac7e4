"""Jobs on the throw-away Slurm: what the scripts in slurm/ build on."""

from pathlib import Path

import pytest
from slurm.clusters import Cluster, local_slurm, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_up_is_over_when_both_nodes_are_idle(cluster: Cluster):
    assert cluster.ask("sinfo", "-h", "-N", "-o", "%N %T").splitlines() == ["n1 idle", "n2 idle"]


def test_a_step_runs_on_both_nodes(cluster: Cluster):
    said = cluster.ask("srun", "-N2", "sh", "-c", "echo $SLURMD_NODENAME $SLURM_PROCID")
    assert sorted(said.splitlines()) == ["n1 0", "n2 1"]


def test_status_shows_nodes_and_jobs(cluster: Cluster, tmp_path: Path):
    job = cluster.submit("--job-name=sleeper", "--wrap=sleep 300", cwd=tmp_path)
    cluster.wait_for(job, "RUNNING")
    said = local_slurm("status", cluster.folder).stdout
    assert said.startswith(f"export SLURM_CONF={cluster.folder}/slurm.conf\n")
    assert "n2" in said and "sleeper" in said
    cluster.ask("scancel", job)
    cluster.wait_for(job, "CANCELLED")


def test_a_requeued_job_starts_again_and_knows_it(cluster: Cluster, tmp_path: Path):
    """Slurm counts no restart at the first start, and makes a requeued job wait two minutes."""
    script = 'echo restart ${SLURM_RESTART_COUNT-none}; test "${SLURM_RESTART_COUNT-}" || sleep 300'
    log = tmp_path / "job.log"
    log.touch()
    options = ["--requeue", "--open-mode=append", f"--output={log}"]
    job = cluster.submit(*options, f"--wrap={script}", cwd=tmp_path)
    wait_until(lambda: "restart none" in log.read_text(), "first start")
    cluster.ask("scontrol", "requeue", job)
    cluster.start_again(job)
    assert cluster.wait_for(job, "COMPLETED")["Restarts"] == "1"
    lines = [line for line in log.read_text().splitlines() if line.startswith("restart")]
    assert lines == ["restart none", "restart 1"]
