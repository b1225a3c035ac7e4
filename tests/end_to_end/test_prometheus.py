"""A real Prometheus finds a run of two ranks by itself, and says of it what metrics.jsonl says."""

import pytest
from metrics.agreement import (
    WORDS,
    check_kept_and_memory,
    check_throughput,
    wait_until_gone,
    watch,
)
from metrics.prom_tools import need_prometheus
from watch_runs import OPENER, running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    need_prometheus()
    folder = tmp_path_factory.mktemp("prometheus")
    with running(folder / "own", folder / "sd", every="1s") as started:
        started.sd_dir = folder / "sd"
        yield started


@pytest.fixture(scope="module")
def told(prometheus, start):
    """What it says of a stretch of the run, and the lines of the same stretch; then the run is
    killed.
    """
    job = start("scraped", *WORDS, f"metrics.sd_dir={prometheus.sd_dir}")
    job.wait_for(lambda: len(job.lines()) > 20, "some steps")
    job.wait_for(lambda: prometheus.value("elip_step > 60"), "a scrape of them")
    values = watch(prometheus)
    job.kill()
    job.finish(ok=False)
    yield values, {line["samples_seen"]: line for line in job.lines() if "losses" in line}, job


def test_one_target_has_both_ranks(told):
    values, _, _ = told
    assert (values["up"], values["nodes"], values["ranks"]) == (1, 1, 2)


def test_throughput_and_utilisation_agree_with_the_file(told):
    values, lines, _ = told
    check_throughput(values, lines)


def test_kept_tokens_and_memory_agree_with_the_file(told):
    values, lines, _ = told
    check_kept_and_memory(values, lines)


def test_the_target_is_gone_when_the_run_is(told, prometheus):
    wait_until_gone(prometheus, prometheus.sd_dir)
    assert (told[2].dir / "final.prom").exists()


def test_the_page_is_served_beside_it(prometheus):
    with OPENER.open(prometheus.page, timeout=10) as answer:
        assert answer.read().decode().startswith("<!DOCTYPE html>")
