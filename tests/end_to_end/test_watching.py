"""What one sees of a run: the endpoint while it trains, its files and scores after."""

import json
import math
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import tiny_words
from end_to_end.jobs import ROOT, Job
from prometheus_client.parser import text_string_to_metric_families

from elip_ds.config import load_config
from elip_ds.engine.schedule import learning_rate
from elip_ds.metrics import CATALOG
from elip_ds.run import find_checkpoint

pytestmark = pytest.mark.slow

WORDS = (
    "metrics.port=0",
    "metrics.every=16 samples",  # two steps
    "schedule.length=2048 samples",
    "schedule.warmup=512 samples",
    "checkpoint.every=64 samples",
    "checkpoint.keep=1",
    "eval.every=64 samples",
    "optim.clip_norm=1.0",
)
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
Samples = dict[tuple[str, str], float]


def scrape(url: str) -> Samples:
    """(sample name, its own label's value) -> value; the first one's where it has several."""
    with OPENER.open(url, timeout=30) as answer:
        return parse(answer.read().decode())


def parse(text: str) -> Samples:
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            own = [v for k, v in sample.labels.items() if k not in ("run", "node", "rank")]
            samples[sample.name, next(iter(own), "")] = sample.value
    return samples


def labelled(samples: Samples, name: str) -> dict[str, float]:
    return {label: value for (series, label), value in samples.items() if series == name}


@dataclass
class Watched:
    """scraped, line: the endpoint and metrics.jsonl at the same step; late: the endpoint after the
    first evaluation and checkpoint.
    """

    job: Job
    scraped: Samples
    line: dict[str, Any]
    late: Samples
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def watched(start) -> Watched:
    job = start("watched", *WORDS, ranks=1)
    file = job.dir / "metrics.url"
    job.wait_for(file.exists, "the endpoint's address")
    url = file.read_text().strip()
    seen: list[tuple[Samples, dict[str, Any]]] = []

    def caught_after_an_interval() -> bool:
        """All values come at once, but not always at the end of an interval."""
        scraped = scrape(url)
        lines = {line["samples_seen"]: line for line in job.lines() if "losses" in line}
        line = lines.get(int(scraped["elip_samples_seen", ""]))
        if line is None or line["step"] < 3 or labelled(scraped, "elip_loss") != line["losses"]:
            return False
        seen.append((scraped, line))
        return True

    job.wait_for(caught_after_an_interval, "values of the end of an interval")
    late: list[Samples] = []

    def evaluated_and_saved() -> bool:
        late.append(scrape(url))
        saved = late[-1]["elip_checkpoint_size_bytes", ""]
        return saved > 0 and ("elip_recall_ratio", "1") in late[-1]

    job.wait_for(evaluated_and_saved, "an evaluation and a checkpoint")
    assert job.ranks[0].poll() is None  # it was watched while it trained
    job.finish()
    return Watched(
        job, *seen[0], late=late[-1], summary=json.loads((job.dir / "summary.json").read_text())
    )


def test_the_endpoint_agrees_with_the_file_while_the_run_trains(watched):
    scraped, line = watched.scraped, watched.line
    assert scraped["elip_samples_total", ""] == line["samples_seen"]
    assert scraped["elip_step", ""] == scraped["elip_optimizer_steps_total", ""] == line["step"]
    assert labelled(scraped, "elip_loss") == line["losses"]
    assert set(line["losses"]) == {"itc", "itm", "mlm"}
    signals = labelled(scraped, "elip_signal")
    assert signals.items() <= line["logs"].items() and "itm_accuracy" in signals
    assert scraped["elip_temperature", ""] == line["logs"]["temperature"]
    for pair in ("positive", "negative", "hardest_negative"):
        assert scraped["elip_similarity", pair] == line["logs"][f"similarity_{pair}"]
    assert scraped["elip_in_batch_recall_ratio", "itc"] == line["logs"]["itc_in_batch_recall"]
    assert labelled(scraped, "elip_learning_rate") == {"": line["learning_rate"]}
    batch = ("elip_micro_batch_size", "elip_gradient_accumulation_steps", "elip_world_size")
    sizes = [labelled(scraped, name)[""] for name in batch]
    assert math.prod(sizes) == labelled(scraped, "elip_global_batch_size")[""]
    assert labelled(scraped, "elip_oom_retries") == {"": 0}
    assert scraped["elip_gradient_norm", ""] == line["gradient_norm"] > 0
    assert scraped["elip_memory_peak_bytes", ""] == pytest.approx(
        line["memory_peak_bytes"], rel=0.01
    )
    assert 2**20 < line["memory_used_bytes"] <= line["memory_peak_bytes"] * 1.01


def test_kept_tokens_are_those_of_the_configuration(watched):
    # 16 patches; 8 and then 4 stay, with the class token and one merged token per stage.
    kept = labelled(watched.scraped, "elip_kept_tokens")
    assert [kept[stage] for stage in ("0", "1")] == watched.line["kept_tokens"]
    assert watched.summary["kept_tokens"] == watched.line["kept_tokens"]
    assert len(kept) == 2 and 1 + 16 > kept["0"] > kept["1"] > 4


def test_the_learning_rate_is_that_of_the_schedule(watched):
    config = load_config(tiny_words(*WORDS))
    for line in watched.job.lines():
        if "losses" in line:
            before = line["samples_seen"] - 8
            expected = learning_rate(before, config.optim, config.schedule, 64)
            assert line["learning_rate"] == pytest.approx(expected, rel=1e-9)


def test_the_parts_of_a_step_are_timed(watched):
    phases = labelled(watched.late, "elip_step_phase_duration_seconds_sum")
    saving, together = phases.pop("checkpoint"), phases.pop("communication")
    assert set(phases) == {"data", "forward", "backward", "optimizer"}
    assert saving > 0 and all(seconds > 0 for seconds in phases.values())
    assert together == 0  # one rank alone
    assert sum(phases.values()) <= watched.late["elip_step_duration_seconds_sum", ""] * 1.05 + 0.5


def test_every_series_of_the_catalog_is_really_there_and_no_other(watched):
    endings = {"info": ("_info",), "histogram": ("_bucket", "_count", "_sum")}
    expected = {e.name + end for e in CATALOG for end in endings.get(e.kind, ("",))}
    assert {name for name, _ in watched.late} == expected


def test_recalls_at_the_endpoint_are_those_of_the_file(watched):
    scores = [line["scores"] for line in watched.job.lines() if "scores" in line]
    recalls = labelled(watched.late, "elip_recall_ratio")
    assert any(all(recalls[str(k)] == s[f"recall_at_{k}"] for k in (1, 5, 10)) for s in scores)


def test_the_last_values_stay_in_the_folder(watched):
    final = parse((watched.job.dir / "final.prom").read_text())
    assert final["elip_samples_total", ""] == final["elip_samples_seen", ""] == 2048
    assert labelled(final, "elip_loss") == watched.summary["losses_end"]


def test_operations_are_those_of_the_steps(watched):
    """As many in each step: all have the same shapes."""
    final = parse((watched.job.dir / "final.prom").read_text())
    operations = final["elip_model_flops_total", ""]
    assert operations % final["elip_optimizer_steps_total", ""] == 0
    assert operations > 2 * 3 * 2048 * 17 * 32 * 32  # more than one projection of all tokens


def test_text_tokens_are_counted_without_padding(watched):
    final = parse((watched.job.dir / "final.prom").read_text())
    tokens = labelled(final, "elip_tokens_total")
    assert tokens["image"] == 2048 * 17
    lines = [line["text_tokens"] for line in watched.job.lines() if "losses" in line]
    assert tokens["text"] == sum(lines)
    assert 3 * 2048 <= tokens["text"] <= 12 * 2048


def test_the_endpoint_ends_with_the_run(watched):
    url = (watched.job.dir / "metrics.url").read_text().strip()
    with pytest.raises(urllib.error.URLError):
        scrape(url)


def test_the_summary_says_what_came_of_it(watched):
    summary, lines = watched.summary, watched.job.lines()
    losses = [line["losses"] for line in lines if "losses" in line]
    assert summary["state"] == "done"
    assert summary["images_per_second"] > 0
    assert (summary["losses_start"], summary["losses_end"]) == (losses[0], losses[-1])
    assert lines[-1]["samples_seen"] == 2048
    assert summary["candidates"] == 16
    assert 0 <= summary["recall_at_1"] <= summary["recall_at_5"] <= summary["recall_at_10"] <= 1
    assert summary["checkpoint"] == str(find_checkpoint(watched.job.dir))
    assert (summary["world_size"], summary["device"]) == (1, "cpu")


def test_the_closing_table_shows_the_same(watched):
    table = watched.job.output[0].partition("watched: done")[2]
    for word in ("throughput", "images/s", "loss itc", "loss itm", "loss mlm"):
        assert word in table
    assert " -> ".join(str(n) for n in watched.summary["kept_tokens"]) in table
    assert f"{100 * watched.summary['recall_at_1']:.1f} %" in table
    assert watched.summary["checkpoint"] in table


def evaluate(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "elip_ds/eval.py", *words]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240)


def test_the_checkpoint_scores_the_same_afterwards(watched):
    done = evaluate(watched.job.dir, "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)  # and nothing else is on stdout
    for key in ("recall_at_1", "recall_at_5", "recall_at_10", "candidates", "checkpoint"):
        assert scores[key] == watched.summary[key], key


def test_fewer_candidates_may_be_asked_for(watched):
    done = evaluate(watched.summary["checkpoint"], "--max-samples", 8)
    assert done.returncode == 0, done.stderr
    assert "8 candidates" in done.stdout


def test_a_folder_without_a_checkpoint_cannot_be_scored(tmp_path):
    done = evaluate(tmp_path)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "[WARNING]" not in line]  # DeepSpeed's
    assert line == f"error: {tmp_path} is neither a checkpoint nor a run that has one"
    assert done.stdout == ""


def test_a_run_that_ends_within_an_interval_still_says_what_came_of_it(start):
    words = ("metrics.every=48 samples", "schedule.length=64 samples")
    job = start("short", *words, ranks=1).finish()
    lines = [line for line in job.lines() if "losses" in line]
    assert [line["step"] for line in lines] == [6, 8]
    summary = json.loads((job.dir / "summary.json").read_text())
    assert summary["losses_end"] == lines[-1]["losses"] != lines[0]["losses"]


def test_a_run_shorter_than_an_interval_reports_losses_and_pruning(start):
    words = ("metrics.every=1024 samples", "schedule.length=32 samples")
    job = start("shorter", *words, ranks=2).finish()
    summary = json.loads((job.dir / "summary.json").read_text())
    assert set(summary["losses_start"]) == set(summary["losses_end"]) == {"itc", "itm", "mlm"}
    assert len(summary["kept_tokens"]) == 2
    assert "no pruning" not in job.output[0]
