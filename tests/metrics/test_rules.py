"""Every alert fires when it is provoked and is silent in a healthy run, by promtool."""

import json
import re
from pathlib import Path

import pytest
from metrics.prom_tools import RULES, promtool

from elip_ds.metrics import CATALOG

EVERY = 30
"Seconds between two samples."
HOURS = 3
COUNT = HOURS * 3600 // EVERY
RANKS = ("0", "1", "2", "3")


def series(name: str, **labels: str) -> str:
    inside = ",".join(f'{key}="{value}"' for key, value in {"run": "r", **labels}.items())
    return f"{name}{{{inside}}}"


def then(*parts: tuple[object, float]) -> str:
    """Values, each for so many hours."""
    return " ".join(" ".join([str(value)] * int(h * 3600 // EVERY)) for value, h in parts)


def steadily(per_second: float, seconds: float = HOURS * 3600, start: float = 0) -> str:
    """Values that grow evenly, as promtool writes them."""
    return f"{start}+{per_second * EVERY}x{int(seconds // EVERY)}"


def constant(value: object) -> str:
    return f"{value}x{COUNT}"


PHASES = {"data": 0.05, "forward": 0.3, "backward": 0.4, "communication": 0.15, "optimizer": 0.1}


def healthy() -> dict[str, str]:
    """A run of 4 ranks, a step a second, 64 samples each, for three hours, saving every half."""
    values = {
        series("up", exporter="elip_ds", node="n0"): constant(1),
        series("elip_samples_total"): steadily(64),
        series("elip_tokens_total", modality="text"): steadily(640),
        series("elip_optimizer_steps_total"): steadily(1),
        series("elip_optimizer_steps_skipped_total", reason="overflow"): constant(2),
        series("elip_samples_skipped_total", source="coco", reason="decode"): steadily(0.01),
        series("elip_loss", objective="itc"): steadily(0.0001, start=5),
        series("elip_start_timestamp_seconds"): constant(0),
        series("elip_world_size"): constant(len(RANKS)),
        series("elip_checkpoint_last_success_timestamp_seconds"): " ".join(
            f"{start}x{1800 // EVERY - 1}" for start in range(0, HOURS * 3600, 1800)
        ),
    }
    for rank in RANKS:
        here = {"node": f"n{int(rank) // 2}", "rank": rank}
        values |= {
            series("elip_rank_up", **here): constant(1),
            series("elip_last_step_timestamp_seconds", **here): steadily(1),
            series("elip_step_duration_seconds_sum", **here): steadily(1),
            series("elip_step_duration_seconds_count", **here): steadily(1),
            series("elip_step_duration_seconds_bucket", **here, le="1"): steadily(1),
            series("elip_step_duration_seconds_bucket", **here, le="+Inf"): steadily(1),
            series("elip_telemetry_seconds_total", **here): steadily(0.001),
            series("elip_model_flops_total", **here): steadily(3e12),
            series("elip_device_peak_flops", **here): constant("10e12"),
            series("elip_memory_used_bytes", **here): constant("20e9"),
            series("elip_memory_limit_bytes", **here): constant("24e9"),
        }
        for phase, share in PHASES.items():
            name = "elip_step_phase_duration_seconds_sum"
            values[series(name, **here, phase=phase)] = steadily(share)
    return values


def of_rank(name: str, rank: str, **more: str) -> str:
    return series(name, node=f"n{int(rank) // 2}", rank=rank, **more)


def phase_of(rank: str, phase: str) -> str:
    return of_rank("elip_step_phase_duration_seconds_sum", rank, phase=phase)


HOUR = 3600
SAMPLES_AT = 64 * HOUR
PROVOKED = {
    "ElipTrainingStalled": {
        of_rank("elip_last_step_timestamp_seconds", rank): f"{steadily(1, HOUR)} {then((3600, 2))}"
        for rank in RANKS
    },
    "ElipNodeSilent": {series("up", exporter="elip_ds", node="n0"): then((1, 1), (0, 2))},
    "ElipRankDead": {of_rank("elip_rank_up", "3"): then((1, 1), (0, 2))},
    "ElipRanksMissing": {of_rank("elip_rank_up", "3"): then((1, 1), ("stale", 2))},
    "ElipLossNotFinite": {series("elip_loss", objective="itc"): then((3, 1), ("NaN", 2))},
    "ElipStepsSkipped": {
        series("elip_optimizer_steps_skipped_total", reason="overflow"): (
            f"{then((2, 1))} {steadily(0.5, 2 * HOUR, start=2)}"
        )
    },
    "ElipThroughputDrop": {
        series("elip_samples_total"): (
            f"{steadily(64, HOUR)} {steadily(40, 2 * HOUR, start=64 * HOUR)}"
        )
    },
    "ElipStragglerRank": {phase_of("2", "forward"): steadily(0.5)},
    "ElipMemoryNearLimit": {
        of_rank("elip_memory_used_bytes", "1"): then(("20e9", 1), ("23.5e9", 2))
    },
    "ElipDataBound": {phase_of(rank, "data"): steadily(0.3) for rank in RANKS},
    "ElipDataLost": {
        series("elip_samples_skipped_total", source="coco", reason="decode"): steadily(2)
    },
    "ElipCheckpointOld": {series("elip_checkpoint_last_success_timestamp_seconds"): constant(0)},
    "ElipRestartLoop": {
        series("elip_start_timestamp_seconds"): then(
            (0, 1), (3600, 1 / 6), (4200, 1 / 6), (4800, 1)
        )
    },
}
WHEN = {
    "ElipTrainingStalled": "1h8m",
    "ElipNodeSilent": "1h3m",
    "ElipRankDead": "1h3m",
    "ElipRanksMissing": "1h4m",
    "ElipLossNotFinite": "1h1m",
    "ElipStepsSkipped": "1h12m",
    "ElipThroughputDrop": "1h25m",
    "ElipRestartLoop": "1h22m",
    "ElipCheckpointOld": "2h10m",
}
"When the alert must be there; the others come sooner than after an hour and five minutes."


def check(values: dict[str, str], folder: Path, *expected: tuple[str, str, dict[str, float]]):
    """promtool's word for it. expected: when an expression has which samples, and no other."""
    case = {
        "rule_files": [str(RULES)],
        "evaluation_interval": f"{EVERY}s",
        "tests": [
            {
                "interval": f"{EVERY}s",
                "input_series": [{"series": k, "values": v} for k, v in values.items()],
                "promql_expr_test": [
                    {
                        "expr": expression,
                        "eval_time": at,
                        "exp_samples": [{"labels": k, "value": v} for k, v in samples.items()],
                    }
                    for at, expression, samples in expected
                ],
            }
        ],
    }
    path = folder / "case.yml"
    path.write_text(json.dumps(case))  # which is YAML
    told = promtool("test", "rules", str(path))
    assert told.returncode == 0, told.stdout + told.stderr


def firing(at: str, *alerts: str) -> tuple[str, str, dict[str, float]]:
    expression = 'group by (alertname, run) (ALERTS{alertstate="firing"})'
    return at, expression, {f'{{alertname="{name}", run="r"}}': 1 for name in alerts}


def test_the_rules_are_rules():
    told = promtool("check", "rules", str(RULES))
    assert told.returncode == 0, told.stdout + told.stderr


def test_a_healthy_run_is_quiet(tmp_path):
    check(healthy(), tmp_path, firing("20m"), firing("1h5m"), firing("2h55m"))


@pytest.mark.parametrize("alert", PROVOKED)
def test_an_alert_fires_when_it_is_provoked_and_no_other_does(tmp_path, alert):
    expected = [firing(WHEN.get(alert, "1h5m"), alert)]
    if alert in WHEN:
        expected.append(firing("59m"))
    check(healthy() | PROVOKED[alert], tmp_path, *expected)


def test_every_alert_is_provoked_here_and_says_what_to_do():
    text = RULES.read_text()
    alerts = re.findall(r"- alert: (\w+)", text)
    assert set(alerts) == set(PROVOKED)
    assert text.count("runbook: >-") == text.count("summary:") == len(alerts)


def test_rules_name_nothing_that_the_catalog_does_not_have():
    known = {entry.name for entry in CATALOG}
    known |= {
        f"{entry.name}{ending}"
        for entry in CATALOG
        if entry.kind == "histogram"
        for ending in ("_sum", "_count", "_bucket")
    }
    expressions = re.sub(r"(runbook|summary): .*", "", RULES.read_text())
    assert set(re.findall(r"(?<![:\w])elip_[a-z_]+", expressions)) - {"elip_ds"} <= known | {
        "elip_recorded",
        "elip_alerts",
    }


def test_the_share_of_peak_is_what_the_counters_say(tmp_path):
    for name, value in {"run:elip_mfu:ratio1m": 0.3, "run:elip_samples:rate1m": 64}.items():
        check(healthy(), tmp_path, ("10m", name, {f'{name}{{run="r"}}': value}))
