"""StepRecords in; log lines, metrics.jsonl, Prometheus series and the closing summary out.

On steps that are not logged nothing is read back from the device.
"""

import json
import logging
import math
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

import elip_ds
from elip_ds import dist
from elip_ds.config import Config, duration_in_samples
from elip_ds.data import TrainLoader
from elip_ds.data.record import KINDS
from elip_ds.engine import Engine, StepRecord, due
from elip_ds.engine.out_of_memory import RETRIES
from elip_ds.metrics.exporter import Exporter
from elip_ds.metrics.progress import Progress
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
        self._steps = 0
        self._last_record: StepRecord | None = None
        self._last_time = self._interval_start = time.perf_counter()
        self._timed_samples, self._timed_seconds, self._seen_steps = 0, 0.0, 0
        self.losses_start: dict[str, float] = {}
        self.losses_end: dict[str, float] = {}
        self.last_scores: dict[str, float] = {}
        self.kept_tokens: tuple[int, ...] = ()
        self.url: str | None = None
        self._exporter = Exporter() if run.first else None
        self._sources = [source.name for source in loader.dataset.sources]
        self._bad: Counter[tuple[str, str]] = Counter()
        self._write_failed = False
        self._progress = Progress(total_samples) if run.first else None
        if self._exporter is not None:
            self._start_exporter(config)
            self._keep_lines_up_to(engine.step)

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
        self._steps += 1
        self._last_record = record
        if self._exporter is not None:
            self._count(record, seconds)
        if due(record.samples_seen, record.global_batch_size, self._every):
            self._write_interval(record)

    def scores(self, scores: dict[str, float]) -> None:
        """Held-out scores: to the log, the file and the endpoint."""
        self._leave_out_pause()
        self.last_scores = scores
        if self._exporter is None:
            return
        at = {"step": self.engine.step, "samples_seen": self.engine.samples_seen}
        self._write(at | {"scores": scores})
        for k in (1, 5, 10):
            self._exporter["elip_recall_ratio"].labels(k).set(scores[f"recall_at_{k}"])
        log.info(
            "held out: recall@1/5/10 %.4f %.4f %.4f of %d candidates (chance %.4f)",
            scores["recall_at_1"],
            scores["recall_at_5"],
            scores["recall_at_10"],
            scores["candidates"],
            1 / scores["candidates"],
        )

    def saved(self, checkpoint: Path | None) -> None:
        self._leave_out_pause()
        if self._exporter is not None and checkpoint is not None:
            self._exporter["elip_checkpoint_last_success_timestamp_seconds"].set(time.time())

    def close(self) -> None:
        """Write the steps after the last whole interval, if any. Every rank calls it."""
        if self._steps and self._last_record is not None:
            self._write_interval(self._last_record)
        if self._progress is not None:
            self._progress.close()

    def _leave_out_pause(self) -> None:
        """What went on since the last step was not training."""
        now = time.perf_counter()
        self._interval_start += now - self._last_time
        self._last_time = now

    def _start_exporter(self, config: Config) -> None:
        assert self._exporter is not None
        out, engine = self._exporter, self.engine
        out["elip_run"].info(
            {
                "run": config.run.name,
                "model": config.model.name,
                "zero_stage": str(engine.stage),
                "precision": engine.precision,
                "version": elip_ds.__version__,
                "torch": torch.__version__,
            }
        )
        out["elip_world_size"].set(self.run.world_size)
        out["elip_global_batch_size"].set(engine.plan.global_batch_size)
        for source in self._sources:  # from 0 on, or the first ones would be no increase
            for kind in KINDS:
                out["elip_samples_skipped_total"].labels(source, kind)
        out["elip_oom_retries"].set(int(os.environ.get(RETRIES, 0)))
        for phase in ("data", "forward", "backward", "optimizer"):
            out["elip_step_phase_seconds_total"].labels(phase)
        if config.metrics.port is None:
            return
        self.url = out.serve(config.metrics.address, config.metrics.port)
        if self.url:
            self.run.write_text(self.run.dir / "metrics.url", self.url + "\n")
            log.info("metrics at %s", self.url)

    def _count(self, record: StepRecord, seconds: float) -> None:
        out = self._exporter
        assert out is not None
        out["elip_samples_total"].inc(record.global_batch_size)
        out["elip_optimizer_steps_total"].inc()
        if not record.applied:
            out["elip_optimizer_steps_skipped_total"].inc()
        out["elip_step_duration_seconds"].observe(seconds)
        for phase, spent in record.seconds.items():
            out["elip_step_phase_seconds_total"].labels(phase).inc(spent)
        out["elip_step"].set(record.step)
        out["elip_micro_batch_size"].set(self.engine.plan.micro_batch_size)
        steps = self.engine.plan.gradient_accumulation_steps
        out["elip_gradient_accumulation_steps"].set(steps)
        out["elip_samples_seen"].set(record.samples_seen)
        out["elip_epoch"].set(record.epoch)
        out["elip_learning_rate"].set(record.learning_rate)
        for stage, tokens in enumerate(record.kept_tokens):
            out["elip_kept_tokens"].labels(stage).set(tokens)
        assert self._progress is not None
        self._progress.advance(record.samples_seen)

    def _write_interval(self, record: StepRecord) -> None:
        names = [*self._losses, *self._logs]
        values = _mean_over_ranks([*self._losses.values(), *self._logs.values()], self._steps)
        means = dict(zip(names, values, strict=True))
        losses = {name: means[name] for name in self._losses}
        logs = {name: means[name] for name in self._logs}
        bad = _sum_over_ranks(record.bad_samples)
        steps, self._steps, self._losses, self._logs = self._steps, 0, {}, {}
        seconds = self._last_time - self._interval_start
        rate = steps * record.global_batch_size / max(1e-9, seconds)
        self._interval_start = self._last_time
        self.losses_start = self.losses_start or losses
        self.losses_end, self.kept_tokens = losses, record.kept_tokens
        if self._exporter is None:
            return
        memory = _memory(self.run.device)
        norm = record.gradient_norm
        line = {
            "step": record.step,
            "samples_seen": record.samples_seen,
            "epoch": record.epoch,
            "losses": losses,
            "logs": logs,
            "learning_rate": record.learning_rate,
            "gradient_norm": None if norm is None else float(norm),
            "images_per_second": rate,
            "seconds": record.seconds,
            "kept_tokens": record.kept_tokens,
            "memory_used_bytes": memory[0],
            "memory_peak_bytes": memory[1],
            "bad_samples": bad.total(),
            "skipped": _by_source(bad),
            "time": time.time(),
        }
        self._write(line)
        for labels, count in (bad - self._bad).items():
            self._exporter["elip_samples_skipped_total"].labels(*labels).inc(count)
        self._bad = bad
        for name, value in losses.items():
            self._exporter["elip_loss"].labels(name).set(value)
        for name, value in logs.items():
            self._exporter["elip_signal"].labels(name).set(value)
        if norm is not None:
            self._exporter["elip_gradient_norm"].set(float(norm))
        self._exporter["elip_memory_used_bytes"].set(memory[0])
        self._exporter["elip_memory_peak_bytes"].set(memory[1])
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
        wrong = [name for name, value in losses.items() if not math.isfinite(value)]
        if wrong:
            log.error("loss %s is not finite at step %d", ", ".join(wrong), record.step)

    def _write(self, line: dict[str, Any]) -> None:
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


def _mean_over_ranks(sums: list[Tensor], steps: int) -> list[float]:
    stacked = torch.stack([value.float() for value in sums]) / steps * dist.sample_weight()
    return (dist.sum_over_ranks(stacked) / dist.world_size()).tolist()


def _sum_over_ranks(counts: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """Of all ranks; every rank calls it."""
    return sum(dist.gather_objects(counts), Counter())


def _by_source(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """source -> reason -> count."""
    nested: dict[str, dict[str, int]] = {}
    for (source, reason), count in sorted(counts.items()):
        nested.setdefault(source, {})[reason] = count
    return nested


def _memory(device: torch.device) -> tuple[int, int]:
    """(used, peak) bytes of this rank."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return psutil.Process().memory_info().rss, peak
