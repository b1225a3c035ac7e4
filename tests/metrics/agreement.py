"""What a real Prometheus says of a stretch of a run, held to the lines of metrics.jsonl."""

import time
from pathlib import Path
from typing import Any

import pytest
from watch_runs import Prometheus

WATCHED_SECONDS = 14
SPAN = f"[{WATCHED_SECONDS - 1}s]"

WORDS = (
    "metrics.port=0",
    "metrics.every=32 samples",
    "metrics.device_peak_tflops=0.05",
    "schedule.length=1000000 samples",
    "checkpoint.every=1000000 samples",
    "run.on_finish=nothing",
    "eval.every=null",
)
"Of a run to be watched: it goes on until it is killed."


def _rate(series: str) -> str:
    """Of rank 0, by its time from the first step seen to the last, where rate() takes that between
    scrapes. The file is of rank 0's intervals, too; another node is scraped at other moments.
    """
    grown, seconds = (
        f"(max_over_time({each}{SPAN}) - min_over_time({each}{SPAN}))"
        for each in (series, 'elip_last_step_timestamp_seconds{rank="0"}')
    )
    return f"sum({grown} / on (node) {seconds})"


QUERIES = {
    "first": f"min_over_time(elip_samples_seen{SPAN})",
    "last": f"max_over_time(elip_samples_seen{SPAN})",
    "samples": _rate("elip_samples_total"),
    # Shapes do not change, so that ranks compute alike.
    "mfu": _rate('elip_model_flops_total{rank="0"}')
    + " * sum(elip_rank_up) / sum(elip_device_peak_flops)",
    "alike": 'sum(elip_model_flops_total{rank="1"}) / sum(elip_model_flops_total{rank="0"})',
    "kept": 'elip_kept_token_ratio{stage="1"}',
    "memory": f'avg_over_time(elip_memory_used_bytes{{rank="0"}}{SPAN})',
    "ranks": "sum(elip_rank_up)",
    "nodes": "count(count by (node) (elip_rank_up))",
    "up": "sum(up)",
}


def watch(prometheus: Prometheus) -> dict[str, Any]:
    """The answers, of the seconds that it takes."""
    time.sleep(WATCHED_SECONDS)
    return {name: prometheus.value(query) for name, query in QUERIES.items()}


def check_throughput(values: dict[str, Any], lines: dict[int, dict[str, Any]]) -> None:
    """lines: of metrics.jsonl, by samples seen."""
    first, last = lines[values["first"]], lines[values["last"]]
    seconds = last["time"] - first["time"]
    images = (last["samples_seen"] - first["samples_seen"]) / seconds
    assert images > 0 and values["samples"] == pytest.approx(images, rel=0.02)
    stretch = [line for seen, line in lines.items() if values["first"] < seen <= values["last"]]
    spent = [32 / line["images_per_second"] for line in stretch]  # by lines of 32 samples
    mfu = sum(s * line["mfu"] for s, line in zip(spent, stretch, strict=True)) / sum(spent)
    assert mfu > 0 and values["mfu"] == pytest.approx(mfu, rel=0.02)
    assert 0.5 < values["alike"] < 2  # written at other moments, up to 15 s apart


def check_kept_and_memory(values: dict[str, Any], lines: dict[int, dict[str, Any]]) -> None:
    """lines: of metrics.jsonl, by samples seen."""
    stretch = [line for seen, line in lines.items() if values["first"] <= seen <= values["last"]]
    assert values["kept"] == pytest.approx(stretch[-1]["kept_token_ratio"][1], rel=1e-9)
    mean = sum(line["memory_used_bytes"] for line in stretch) / len(stretch)
    assert values["memory"] == pytest.approx(mean, rel=0.02)


def wait_until_gone(prometheus: Prometheus, targets: Path) -> None:
    """Until no file names a target, Prometheus has dropped it, and its series have ended."""
    deadline = time.monotonic() + 20
    while (
        any(targets.glob("elip-*.json"))
        or prometheus.ask("targets")["activeTargets"]
        or prometheus.value("elip_step") is not None
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)
