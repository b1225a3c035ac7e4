"""A real Prometheus finds both nodes of a job of a real Slurm, and loses them when it ends."""

import json
from pathlib import Path

import pytest
from metrics.agreement import (
    WORDS,
    check_kept_and_memory,
    check_throughput,
    wait_until_gone,
    watch,
)
from metrics.prom_tools import need_prometheus
from slurm.clusters import Cluster, wait_until
from slurm.test_pretrain_script import TRAINS_SECONDS, submit
from watch_runs import running

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_both_nodes_are_found_and_agree_with_the_file(
    cluster: Cluster, tmp_path: Path, shared_scenes: Path
):
    need_prometheus()
    targets = tmp_path / "sd"
    with running(tmp_path / "own", targets, every="1s") as prometheus:
        where = (f"data.builtin.dir={shared_scenes}", f"metrics.sd_dir={targets}")
        job = submit(cluster, tmp_path, *WORDS, *where)
        wait_until(lambda: prometheus.value("elip_step > 60"), "a scrape", TRAINS_SECONDS)
        values = watch(prometheus)
        named = prometheus.value(f'count(elip_run_info{{slurm_job_id="{job}"}})')
        restarts = prometheus.value("elip_slurm_restarts")
        cluster.ask("scancel", job)
        cluster.wait_for(job, "CANCELLED")
        wait_until_gone(prometheus, targets)
    assert (values["up"], values["nodes"], values["ranks"]) == (2, 2, 2)
    assert (named, restarts) == (1, 0)
    metrics = (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in metrics]
    by_samples = {line["samples_seen"]: line for line in lines if "losses" in line}
    check_throughput(values, by_samples)
    check_kept_and_memory(values, by_samples)
