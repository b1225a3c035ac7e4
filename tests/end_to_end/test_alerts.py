"""Alerts of real runs under a real Prometheus, in the packaged rules at sixty times their speed.

Under promtool all alerts are held to made-up series (tests/metrics/test_rules.py); here some are
provoked in runs, and a healthy run is to raise none.
"""

import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from metrics.agreement import WORDS
from metrics.prom_tools import RULES, need_prometheus, promtool
from watch_runs import running

pytestmark = pytest.mark.slow

FASTER = 60
LEAST_SECONDS = 4
"A rate needs a few scrapes, one a second."
UNITS = {"s": 1, "m": 60, "h": 3600}
ENDS_SECONDS = 60


def quickened(rules: str) -> str:
    """With all durations shorter, and the thresholds that are seconds."""

    def shorter(found: re.Match) -> str:
        seconds = int(found[1]) * UNITS[found[2]] // FASTER
        return f"{max(seconds, 1 if found[0] == '15s' else LEAST_SECONDS)}s"

    rules = re.sub(r"\b(\d+)([smh])\b(?=[\]):\s]|$)", shorter, rules)
    for seconds in (300, 7200):
        rules = re.sub(rf"([<>]) {seconds}\b", rf"\1 {seconds // FASTER}", rules)
    return rules


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    need_prometheus()
    folder = tmp_path_factory.mktemp("alerts")
    rules = folder / "rules.yml"
    rules.write_text(quickened(RULES.read_text()))
    assert promtool("check", "rules", str(rules)).returncode == 0
    with running(folder / "own", folder / "sd", every="1s", rules=rules) as started:
        started.sd_dir = folder / "sd"
        yield started


def firing(prometheus, run: str) -> set[str]:
    found = prometheus.ask("query", query=f'ALERTS{{alertstate="firing", run="{run}"}}')
    return {each["metric"]["alertname"] for each in found["result"]}


def wait_for(prometheus, run: str, alert: str) -> None:
    end = time.monotonic() + ENDS_SECONDS
    while alert not in firing(prometheus, run):
        assert time.monotonic() < end, f"{alert} does not fire, but {firing(prometheus, run)}"
        time.sleep(0.2)


@contextmanager
def held_up(process: psutil.Process, stopped: float, running: float) -> Iterator[None]:
    """Stopped and let run in turns, of so many seconds."""
    over = threading.Event()

    def hold() -> None:
        while not over.is_set():
            process.send_signal(signal.SIGSTOP)
            time.sleep(stopped)
            process.send_signal(signal.SIGCONT)
            over.wait(running)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture(scope="module")
def run(prometheus, start):
    """Two ranks, each with a worker that loads, until the tests are over."""
    words = (*WORDS, "data.workers=1", f"metrics.sd_dir={prometheus.sd_dir}")
    job = start("watched", *words)
    job.wait_for(lambda: prometheus.value('elip_step{run="watched"} > 60'), "a scrape")
    return job


def test_a_healthy_run_raises_none(prometheus, run):
    time.sleep(15)
    assert firing(prometheus, "watched") == set()


def test_a_rank_that_is_stopped_stalls_the_run(prometheus, run):
    with held_up(psutil.Process(run.ranks[1].pid), stopped=12, running=0):
        wait_for(prometheus, "watched", "ElipTrainingStalled")


def test_a_rank_that_is_slow_is_named(prometheus, run):
    with held_up(psutil.Process(run.ranks[1].pid), stopped=0.3, running=0.03):
        wait_for(prometheus, "watched", "ElipStragglerRank")
    found = prometheus.ask("query", query='ALERTS{alertname="ElipStragglerRank"}')["result"]
    assert {each["metric"]["rank"] for each in found} == {"1"}


def test_a_loader_that_is_slow_makes_the_run_data_bound(prometheus, run):
    rank = psutil.Process(run.ranks[0].pid)
    (worker,) = (x for x in rank.children() if x.cmdline() == rank.cmdline())
    with held_up(worker, stopped=0.5, running=0.05):
        wait_for(prometheus, "watched", "ElipDataBound")


def test_a_loss_that_is_no_number_and_memory_near_its_limit(prometheus, start):
    words = (*WORDS, "optim.lr=1e30", "batching.micro_batch_size=8", "batching.probe=never")
    small = ("batching.device_memory=cpu:700MiB", f"metrics.sd_dir={prometheus.sd_dir}")
    start("broken", *words, *small, ranks=1)
    wait_for(prometheus, "broken", "ElipLossNotFinite")
    wait_for(prometheus, "broken", "ElipMemoryNearLimit")
