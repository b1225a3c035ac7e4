"""StepRecords -> the catalog's series, on every rank.

A step costs a few additions; the rest is set when the series are written, every few seconds.
Nothing is read back from the device but at the end of an interval.
"""

import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

import elip_ds
from elip_ds import dist
from elip_ds.config import Config
from elip_ds.data import TrainLoader
from elip_ds.data.record import KINDS
from elip_ds.engine import Engine, StepRecord
from elip_ds.engine.engine import PHASES as STEP_PHASES
from elip_ds.engine.operations import Operations
from elip_ds.engine.out_of_memory import RETRIES
from elip_ds.metrics.catalog import PHASES
from elip_ds.metrics.exporter import Exporter
from elip_ds.metrics.plan_file import read_memory
from elip_ds.metrics.publishing import Publisher
from elip_ds.run import Run

LAZY_SECONDS = 10.0
"Series are written at the end of an interval, or where none ends for so long."
TIMES_THE_COST = 500
"But no sooner than after so many times what writing them cost this thread the last time."
MOST_PAUSE_SECONDS = 15.0
"And no later than a usual scrape wants them, whatever that was."
TWIN_SECONDS = 30.0
"Between two measurements of the twin's distance, which reads all weights."
RECALLS = (1, 5, 10)
OUTCOMES = ("kept", "pruned")
SIMILARITIES = ("positive", "negative", "hardest_negative")


class Telemetry:
    """Every rank has one. Of scope run only rank 0 sets the series.

    peak_flops: what the devices of all ranks can do together.
    """

    def __init__(self, config: Config, run: Run, engine: Engine, loader: TrainLoader) -> None:
        self.run, self.engine, self._loader, self._config = run, engine, loader, config
        self.out = Exporter(run=config.run.name, node=dist.node_name(), rank=run.rank)
        self._bad: Counter[tuple[str, str]] = Counter()
        self._operations = 0
        engine.operations = Operations()
        given = config.metrics.device_peak_tflops
        own_peak = engine.matmul_peak() if given is None else given * 1e12
        self.peak_flops = sum(dist.gather_objects(own_peak))
        self.patches = config.model.vision.num_patches
        self._start_rank(own_peak)
        if run.first:
            self._start_run(engine.total_samples(loader))
        self.publisher = Publisher(config.metrics, run, self.out)
        self._written = self._twin_measured = time.perf_counter()
        self._pause = 0.0  # seconds from one writing to the next

    def step(self, record: StepRecord, seconds: float) -> None:
        """seconds: of the step, by the wall clock."""
        with self._timed():
            self.out["elip_step_duration_seconds"].observe(seconds)
            for phase, spent in record.seconds.items():
                self._phases[phase].observe(spent)
            if self.run.first:
                self._count(record)
            if time.perf_counter() - self._written > max(LAZY_SECONDS, self._pause):
                self._write(record)

    def interval(self, record: StepRecord, line: dict[str, Any]) -> None:
        """The end of an interval, which line says as metrics.jsonl has it; on rank 0 alone it has
        more than its step.
        """
        with self._timed():
            if self.run.first:
                self._set_means(line)
            if time.perf_counter() - self._written > self._pause:
                self._measure_twin()
                self._write(record)

    def bad_samples(self, counts: Counter[tuple[str, str]]) -> None:
        """counts: of all ranks since the start."""
        for labels, count in (counts - self._bad).items():
            self.out["elip_samples_skipped_total"].labels(*labels).inc(count)
        self._bad = counts

    def scores(self, scores: dict[str, float]) -> None:
        for k in RECALLS:
            self.out["elip_recall_ratio"].labels(k).set(scores[f"recall_at_{k}"])

    def saved(self, checkpoint: Path | None, seconds: float) -> None:
        self._phases["checkpoint"].observe(seconds)
        if not self.run.first:
            return
        if checkpoint is None:
            self.out["elip_checkpoint_failures_total"].inc()
            return
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
        self.out["elip_checkpoint_size_bytes"].set(size)
        self.out["elip_checkpoint_last_success_timestamp_seconds"].set(time.time())

    def close(self, record: StepRecord | None) -> None:
        if record is not None:
            self._twin_measured = 0.0
            self._measure_twin()
            self._write(record)
        self.publisher.close()

    def _start_rank(self, peak_flops: float) -> None:
        out = self.out
        series = out["elip_step_phase_duration_seconds"]
        self._phases = {phase: series.labels(phase) for phase in PHASES}
        assert {*STEP_PHASES, "checkpoint"} == {*PHASES}
        out["elip_device_peak_flops"].set(peak_flops)
        self._memory = read_memory(self.run.dir, dist.node_name())
        out["elip_memory_limit_bytes"].set(self._memory.limit_bytes)
        out["elip_last_step_timestamp_seconds"].set(time.time())

    def _start_run(self, total_samples: int) -> None:
        """What does not change; and every label's value, so that its first event is an increase."""
        out, engine, run = self.out, self.engine, self.run
        out["elip_run"].info(_info(self._config, engine))
        out["elip_start_timestamp_seconds"].set(run.started)
        out["elip_checkpoint_last_success_timestamp_seconds"].set(run.started)
        out["elip_slurm_restarts"].set(int(os.environ.get("SLURM_RESTART_COUNT", 0)))
        out["elip_world_size"].set(run.world_size)
        out["elip_global_batch_size"].set(engine.plan.global_batch_size)
        out["elip_length_samples"].set(total_samples)
        out["elip_oom_retries"].set(int(os.environ.get(RETRIES, 0)))
        out["elip_memory_planned_peak_bytes"].set(self._memory.planned_bytes)
        out["elip_optimizer_steps_skipped_total"].labels("overflow")
        for source in self._loader.dataset.sources:
            for kind in KINDS:
                out["elip_samples_skipped_total"].labels(source.name, kind)
        for modality in ("image", "text"):
            out["elip_tokens_total"].labels(modality)
        for stage in range(len(self._config.pruning.stages)):
            for outcome in OUTCOMES:
                out["elip_vision_tokens_total"].labels(stage, outcome)

    def _count(self, record: StepRecord) -> None:
        out, samples = self.out, record.global_batch_size
        out["elip_samples_total"].inc(samples)
        out["elip_optimizer_steps_total"].inc()
        if not record.applied:
            out["elip_optimizer_steps_skipped_total"].labels("overflow").inc()
        before = 1 + self.patches
        out["elip_tokens_total"].labels("image").inc(samples * before)
        for stage, after in enumerate(record.kept_tokens):
            for outcome, tokens in zip(OUTCOMES, (after, max(0, before - after)), strict=True):
                out["elip_vision_tokens_total"].labels(stage, outcome).inc(samples * tokens)
            before = after

    def _set_means(self, line: dict[str, Any]) -> None:
        out = self.out
        for name, value in line["losses"].items():
            out["elip_loss"].labels(name).set(value)
        for name, value in line["logs"].items():
            self._set_signal(name, value)
        if line["nonfinite"]:
            out["elip_nonfinite_losses_total"].inc()
        out["elip_tokens_total"].labels("text").inc(line["text_tokens"])
        if line["gradient_norm"] is not None:
            out["elip_gradient_norm"].set(line["gradient_norm"])

    def _set_signal(self, name: str, value: float) -> None:
        """Objectives name what they log; what has a series of its own goes there."""
        out = self.out
        objective = name.removesuffix("_in_batch_recall")
        if name == "temperature":
            out["elip_temperature"].set(value)
        elif name == "logit_scale":
            out["elip_temperature"].set(1 / value)
        elif name.startswith("similarity_"):
            out["elip_similarity"].labels(name.removeprefix("similarity_")).set(value)
        elif objective != name:
            out["elip_in_batch_recall_ratio"].labels(objective).set(value)
        else:
            out["elip_signal"].labels(name).set(value)

    def _measure_twin(self) -> None:
        if not self.run.first or time.perf_counter() - self._twin_measured < TWIN_SECONDS:
            return
        distance = self.engine.teacher_distance()
        if distance is not None:
            self.out["elip_ema_distance_ratio"].set(distance)
        self._twin_measured = time.perf_counter()

    def _write(self, record: StepRecord) -> None:
        start = time.thread_time()  # a rank that is held up meanwhile must not fall silent for it
        self._set_rank()
        if self.run.first:
            self._set_position(record)
        self.publisher.write()
        self._written = time.perf_counter()
        self._pause = min(MOST_PAUSE_SECONDS, TIMES_THE_COST * (time.thread_time() - start))

    def _set_rank(self) -> None:
        out = self.out
        operations = self.engine.operations
        assert operations is not None
        out["elip_model_flops_total"].inc(operations.total - self._operations)
        self._operations = operations.total
        used, peak = memory(self.run.device)
        out["elip_memory_used_bytes"].set(used)
        out["elip_memory_peak_bytes"].set(peak)
        out["elip_loader_ready_batches"].set(self._loader.ready)
        out["elip_last_step_timestamp_seconds"].set(time.time())

    def _set_position(self, record: StepRecord) -> None:
        out, plan = self.out, self.engine.plan
        out["elip_step"].set(record.step)
        out["elip_samples_seen"].set(record.samples_seen)
        out["elip_epoch"].set(record.epoch)
        out["elip_learning_rate"].set(record.learning_rate)
        out["elip_loss_scale"].set(self.engine.loss_scale)
        out["elip_micro_batch_size"].set(plan.micro_batch_size)
        out["elip_gradient_accumulation_steps"].set(plan.gradient_accumulation_steps)
        for stage, tokens in enumerate(record.kept_tokens):
            out["elip_kept_tokens"].labels(stage).set(tokens)
            out["elip_kept_token_ratio"].labels(stage).set(tokens / (1 + self.patches))
        for source, (at, of) in self._loader.shard_positions(record.samples_seen).items():
            out["elip_shard_position"].labels(source).set(at)
            out["elip_shards"].labels(source).set(of)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.out["elip_telemetry_seconds_total"].inc(time.perf_counter() - start)


def memory(device: torch.device) -> tuple[int, int]:
    """(used, peak) bytes of this rank."""
    if device.type == "cuda":
        # Held, not allocated: between two steps next to nothing is allocated.
        return torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return psutil.Process().memory_info().rss, peak


def _info(config: Config, engine: Engine) -> dict[str, str]:
    return {
        "preset": config.preset,
        "model": config.model.name,
        "zero_stage": str(engine.stage),
        "precision": engine.precision,
        "slurm_job_id": os.environ.get("SLURM_JOB_ID", ""),
        "git": _git_revision(),
        "version": elip_ds.__version__,
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
    }


def _git_revision() -> str:
    """Of the package's own repository; 'none' where it is installed without one."""
    package = Path(elip_ds.__file__).parent
    command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "none"
    return done.stdout.strip() if done.returncode == 0 else "none"
