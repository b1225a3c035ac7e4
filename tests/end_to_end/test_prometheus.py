"""A real Prometheus finds a run of two ranks by itself, and says of it what metrics.jsonl says."""

import time

import pytest
from metrics.prom_tools import need_prometheus
from watch_runs import running

pytestmark = pytest.mark.slow

WORDS = (
    "metrics.port=0",
    "metrics.every=32 samples",
    "metrics.device_peak_tflops=0.05",
    "schedule.length=1000000 samples",
    "checkpoint.every=1000000 samples",
    "run.on_finish=nothing",
    "eval.every=null",
)
WATCHED_SECONDS = 14


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
    time.sleep(WATCHED_SECONDS)
    span = f"[{WATCHED_SECONDS - 1}s]"

    def grown(name: str) -> str:
        return f"(sum(max_over_time({name}{span})) - sum(min_over_time({name}{span})))"

    # Over the time from the first step seen to the last, where rate() takes that between scrapes.
    seconds = grown('elip_last_step_timestamp_seconds{rank="0"}')
    answers = {
        "first": f"min_over_time(elip_samples_seen{span})",
        "last": f"max_over_time(elip_samples_seen{span})",
        "samples": f"{grown('elip_samples_total')} / {seconds}",
        "mfu": f"{grown('elip_model_flops_total')} / {seconds} / sum(elip_device_peak_flops)",
        "kept": 'elip_kept_token_ratio{stage="1"}',
        "memory": f'avg_over_time(elip_memory_used_bytes{{rank="0"}}{span})',
        "ranks": "sum(elip_rank_up)",
        "up": "sum(up)",
    }
    values = {name: prometheus.value(query) for name, query in answers.items()}
    job.kill()
    job.finish(ok=False)
    yield values, {line["samples_seen"]: line for line in job.lines() if "losses" in line}, job


def test_one_target_has_both_ranks(told):
    values, _, _ = told
    assert (values["up"], values["ranks"]) == (1, 2)


def test_throughput_and_utilisation_agree_with_the_file(told):
    values, lines, _ = told
    first, last = lines[values["first"]], lines[values["last"]]
    seconds = last["time"] - first["time"]
    images = (last["samples_seen"] - first["samples_seen"]) / seconds
    assert images > 0 and values["samples"] == pytest.approx(images, rel=0.02)
    stretch = [line for seen, line in lines.items() if values["first"] < seen <= values["last"]]
    spent = [32 / line["images_per_second"] for line in stretch]  # by lines of 32 samples
    mfu = sum(s * line["mfu"] for s, line in zip(spent, stretch, strict=True)) / sum(spent)
    assert mfu > 0 and values["mfu"] == pytest.approx(mfu, rel=0.02)


def test_kept_tokens_and_memory_agree_with_the_file(told):
    values, lines, _ = told
    stretch = [line for seen, line in lines.items() if values["first"] <= seen <= values["last"]]
    assert values["kept"] == pytest.approx(stretch[-1]["kept_token_ratio"][1], rel=1e-9)
    mean = sum(line["memory_used_bytes"] for line in stretch) / len(stretch)
    assert values["memory"] == pytest.approx(mean, rel=0.02)


def test_the_target_is_gone_when_the_run_is(told, prometheus):
    deadline = time.monotonic() + 20
    while any(prometheus.sd_dir.glob("elip-*.json")) or prometheus.ask("targets")["activeTargets"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert prometheus.value("elip_step") is None
    assert (told[2].dir / "final.prom").exists()


def test_the_page_is_served_beside_it(prometheus):
    from watch_runs import OPENER

    with OPENER.open(prometheus.page, timeout=10) as answer:
        assert answer.read().decode().startswith("<!DOCTYPE html>")
