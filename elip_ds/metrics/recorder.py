"""StepRecords in; log lines and metrics.jsonl out, and by telemetry.py the Prometheus series.

On steps that are not logged nothing is read back from the device.
"""

import json
import logging
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from elip_ds import dist
from elip_ds.config import Config, duration_in_samples
from elip_ds.data import TrainLoader
from elip_ds.engine import Engine, StepRecord, due
from elip_ds.metrics.also import open_writers, write_line
from elip_ds.metrics.progress import Progress
from elip_ds.metrics.telemetry import Telemetry, memory
from elip_ds.run import Run

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
WARM_STEPS = 3
"Steps left out of the throughput: they allocate and warm up."


class Recorder:
    """Every rank has one and calls it alike, as losses are averaged over ranks; rank 0 writes."""

    def __init__(self, config: Config, run: Run, engine: Engine, loader: TrainLoader) -> None:
        self.run, self.engine = run, engine
        self._every = duration_in_samples(config.metrics.every, loader.samples_per_epoch)
        total_samples = engine.total_samples(loader)
        self._losses: dict[str, Any] = {}
        self._logs: dict[str, Any] = {}
        self._text_tokens: Any = 0
        self._steps = 0
        self._last_record: StepRecord | None = None
        self._timed_samples, self._timed_seconds, self._seen_steps = 0, 0.0, 0
        self.losses_start: dict[str, float] = {}
        self.losses_end: dict[str, float] = {}
        self.last_scores: dict[str, float] = {}
        self.kept_tokens: tuple[int, ...] = ()
        self._write_failed = False
        self._progress = Progress(total_samples) if run.first else None
        if run.first:
            self._keep_lines_up_to(engine.step)
        self._also = open_writers(config, run.dir, engine.step) if run.first else []
        self.telemetry = Telemetry(config, run, engine, loader)
        self._last_operations = 0
        self._last_time = self._interval_start = time.perf_counter()
        if run.first and self.telemetry.publisher.url:
            log.info("metrics at %s", self.telemetry.publisher.url)

    @property
    def images_per_second(self) -> float:
        """Training throughput over all ranks since this start, evaluations and saves left out."""
        return self._timed_samples / self._timed_seconds if self._timed_seconds else 0.0

    def step(self, record: StepRecord) -> None:
        """Take in one optimizer step; at the end of an interval, write it."""
        now = time.perf_counter()
        seconds = now - self._last_time
        self._last_time = now
        self._seen_steps += 1
        if self._seen_steps > WARM_STEPS:
            self._timed_samples += record.global_batch_size
            self._timed_seconds += seconds
        for total, part in ((self._losses, record.losses), (self._logs, record.logs)):
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        self._text_tokens = self._text_tokens + record.text_tokens
        self._steps += 1
        self._last_record = record
        self.telemetry.step(record, seconds)
        if self._progress is not None:
            self._progress.advance(record.samples_seen)
        if due(record.samples_seen, record.global_batch_size, self._every):
            self._write_interval(record)

    def scores(self, scores: dict[str, float]) -> None:
        """Held-out scores: to the log, the file and the endpoint."""
        self._leave_out_pause()
        self.last_scores = scores
        if not self.run.first:
            return
        at = {"step": self.engine.step, "samples_seen": self.engine.samples_seen}
        self._write(at | {"scores": scores})
        self.telemetry.scores(scores)
        log.info(
            "held out: recall@1/5/10 %.4f %.4f %.4f of %d candidates (chance %.4f)",
            scores["recall_at_1"],
            scores["recall_at_5"],
            scores["recall_at_10"],
            scores["candidates"],
            1 / scores["candidates"],
        )

    def saved(self, checkpoint: Path | None) -> None:
        """checkpoint: what engine.save gave, just now."""
        self.telemetry.saved(checkpoint, time.perf_counter() - self._last_time)
        self._leave_out_pause()

    def close(self) -> None:
        """Write the steps after the last whole interval, if any. Every rank calls it."""
        if self._steps and self._last_record is not None:
            self._write_interval(self._last_record)
        self.telemetry.close(self._last_record)
        for writer in self._also:
            writer.close()
        if self._progress is not None:
            self._progress.close()

    def _leave_out_pause(self) -> None:
        """What went on since the last step was not training."""
        now = time.perf_counter()
        self._interval_start += now - self._last_time
        self._last_time = now

    def _write_interval(self, record: StepRecord) -> None:
        operations = self.engine.operations.total if self.engine.operations else 0
        done, self._last_operations = operations - self._last_operations, operations
        own = dist.sample_weight()
        sums = {name: own * x for name, x in (self._losses | self._logs).items()}
        sums["text tokens"] = self._text_tokens
        means, ranks_done = _mean_over_ranks(sums, self._steps, done, self.run.device)
        losses = {name: means[name] for name in self._losses}
        logs = {name: means[name] for name in self._logs}
        bad = _sum_over_ranks(record.bad_samples)
        steps, self._steps, self._losses, self._logs = self._steps, 0, {}, {}
        self._text_tokens = 0
        seconds = max(1e-9, self._last_time - self._interval_start)
        rate = steps * record.global_batch_size / seconds
        self._interval_start = self._last_time
        self.losses_start = self.losses_start or losses
        self.losses_end, self.kept_tokens = losses, record.kept_tokens
        wrong = [name for name, value in losses.items() if not math.isfinite(value)]
        line: dict[str, Any] = {"step": record.step}
        if self.run.first:
            used, peak = memory(self.run.device)
            norm = record.gradient_norm
            tokens = 1 + self.telemetry.patches
            line |= {
                "samples_seen": record.samples_seen,
                "epoch": record.epoch,
                "losses": losses,
                "logs": logs,
                "learning_rate": record.learning_rate,
                "gradient_norm": None if norm is None else float(norm),
                "images_per_second": rate,
                "tflops": ranks_done / seconds / 1e12,
                "mfu": ranks_done / seconds / self.telemetry.peak_flops,
                "seconds": record.seconds,
                "kept_tokens": record.kept_tokens,
                "kept_token_ratio": [kept / tokens for kept in record.kept_tokens],
                "text_tokens": round(means["text tokens"] * steps * self.run.world_size),
                "micro_batch_size": self.engine.plan.micro_batch_size,
                "global_batch_size": record.global_batch_size,
                "loss_scale": self.engine.loss_scale,
                "applied": record.applied,
                "nonfinite": wrong,
                "memory_used_bytes": used,
                "memory_peak_bytes": peak,
                "bad_samples": bad.total(),
                "skipped": _by_source(bad),
                "time": time.time(),
            }
            self._write(line)
            self.telemetry.bad_samples(bad)
            self._tell(record, losses, rate, wrong)
        self.telemetry.interval(record, line)

    def _tell(
        self, record: StepRecord, losses: dict[str, float], rate: float, wrong: list[str]
    ) -> None:
        text = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        assert self._progress is not None
        if not self._progress.show(text, rate):
            log.info(
                "step %d  epoch %.2f  %s  lr %.2e  %.0f images/s",
                record.step,
                record.epoch,
                text,
                record.learning_rate,
                rate,
            )
        if wrong:
            log.error("loss %s is not finite at step %d", ", ".join(wrong), record.step)

    def _write(self, line: dict[str, Any]) -> None:
        write_line(self._also, line)
        try:
            with (self.run.dir / METRICS).open("a") as file:
                file.write(json.dumps(_strict(line)) + "\n")
        except OSError as error:  # metrics never stop a run
            if not self._write_failed:
                log.error("%s is not written: %s", self.run.dir / METRICS, error.strerror)
            self._write_failed = True

    def _keep_lines_up_to(self, step: int) -> None:
        """Drop what a killed run wrote after the checkpoint that this start goes on from."""
        path = self.run.dir / METRICS
        if not path.exists():
            return
        kept = []
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # the kill cut it
                continue
            if line["step"] <= step:
                kept.append(text)
                if "losses" in line:
                    self.losses_start = self.losses_start or line["losses"]
        self.run.write_text(path, "".join(f"{text}\n" for text in kept))


def _strict(value: Any) -> Any:
    """NaN and infinities, which JSON has no word for, as null."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean_over_ranks(
    sums: dict[str, Any], steps: int, operations: int, device: torch.device
) -> tuple[dict[str, float], float]:
    """Of each sum its mean by steps and ranks; and the operations of all ranks."""
    parts = [torch.as_tensor(value, device=device).float() / steps for value in sums.values()]
    parts.append(torch.tensor(float(operations), device=device))
    *means, total = dist.sum_over_ranks(torch.stack(parts)).tolist()
    return {k: v / dist.world_size() for k, v in zip(sums, means, strict=True)}, total


def _sum_over_ranks(counts: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """Of all ranks; every rank calls it."""
    return sum(dist.gather_objects(counts), Counter())


def _by_source(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """source -> reason -> count."""
    nested: dict[str, dict[str, int]] = {}
    for (source, reason), count in sorted(counts.items()):
        nested.setdefault(source, {})[reason] = count
    return nested
