"""One optimizer step at a time, under DeepSpeed, from any checkpoint.

Owns the position of the run (step, samples seen) and the learning rate.
"""

import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from elip_ds import dist
from elip_ds.batching import Plan
from elip_ds.config import Config, duration_in_samples
from elip_ds.data import Batch, HeldOut, TrainLoader
from elip_ds.engine.compile import check_compile, compile_blocks
from elip_ds.engine.ds_config import fill_ds_config, fit_buckets
from elip_ds.engine.fused import Place, choose_kernels, swap_layer_norms
from elip_ds.engine.lamb import Lamb, bind_lamb, check_lamb
from elip_ds.engine.operations import Operations, matmul_peak
from elip_ds.engine.optim import build_optimizer
from elip_ds.engine.prefetch import Prefetcher
from elip_ds.engine.saving import Saving, newest_step
from elip_ds.engine.schedule import learning_rate, settle_optim
from elip_ds.engine.sharding import local_tensor, refresh
from elip_ds.objectives import Progress
from elip_ds.run import TOKENIZER, Run
from elip_ds.tasks import Pretrain
from elip_ds.towers.pruning import keep_ratios_at
from elip_ds.weights import start_from

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PHASES = ("data", "forward", "backward", "communication", "optimizer")


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What one optimizer step was. losses, logs: means over this rank's micro-batches, on the
    device. seconds: by phase, host time; of communication what collectives hold the host up, which
    on a CPU is all they take and on a GPU next to nothing.  applied: False when fp16 overflow
    skipped the update.  kept_tokens: sequence length after each pruning stage.  text_tokens: of
    this rank's captions, padding left out, on the device.  bad_samples: left out on this rank since
    its start, by source and kind (see data/record.py).
    """

    step: int
    samples_seen: int
    epoch: float
    losses: dict[str, Tensor]
    logs: dict[str, Tensor]
    learning_rate: float
    gradient_norm: float | Tensor | None
    seconds: dict[str, float]
    kept_tokens: tuple[int, ...]
    text_tokens: Tensor
    global_batch_size: int
    applied: bool
    bad_samples: Counter[tuple[str, str]]


class Engine:
    def __init__(
        self, config: Config, ds_tree: dict[str, Any], task: Pretrain, plan: Plan, run: Run
    ) -> None:
        """ds_tree: as read_ds_config gave it.  task: on the CPU, in fp32, equal on all ranks."""
        self.config, self.plan, self.run, self.task = config, plan, run, task
        self.step, self.samples_seen = 0, 0
        dist.deal_samples(plan.micro_batches)
        self._bad: Counter[tuple[str, str]] = Counter()
        self.on_lap: Callable[[str], None] = lambda part: None
        "Told each part of a step, as StepRecord.seconds names them, that has just ended."
        self.operations: Operations | None = None
        "Where it is given, it counts what the steps compute."
        self._ahead: Prefetcher | None = None
        self._side = torch.cuda.Stream(run.device) if run.device.type == "cuda" else None
        self._optim = settle_optim(config.optim, plan.global_batch_size)
        self.ds_config = fill_ds_config(
            ds_tree, engine=config.engine, optim=self._optim, plan=plan, device=run.device
        )
        fit_buckets(self.ds_config, sum(p.numel() for p in task.parameters() if p.requires_grad))
        if run.first:
            run.write_text(run.dir / "ds_config.json", json.dumps(self.ds_config, indent=1))
        check_compile(config.engine.compile, self.stage)
        if self._optim.name == "lamb":
            check_lamb(self.ds_config)
        if self._optim != config.optim:
            log.info(
                "%s, peak learning rate %.4g (optim.lr=%g), for batch %d",
                *(self._optim.name, self._optim.lr, config.optim.lr, plan.global_batch_size),
            )
        newest = newest_step(run)
        if newest is None:
            paths = [Path(path) for path in config.model.init_from]
            # Before DeepSpeed shards and rounds them.
            start_from(task, config.model, paths, run.dir / TOKENIZER)
        optimizer = self._build_optimizer()
        if run.device.type == "cpu":
            # DeepSpeed would compile a shared-memory all-reduce for over a minute; gloo has one.
            deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
        task.to(run.device)
        if config.engine.compile:
            compile_blocks(task)
        self._engine, *_ = deepspeed.initialize(
            model=task, optimizer=optimizer, config=self.ds_config
        )
        if isinstance(optimizer, Lamb):
            bind_lamb(optimizer, self._engine.optimizer)
        form = {
            "world_size": run.world_size,
            "zero_stage": self.stage,
            "precision": self.precision,
            "optimizer": self._optimizer_kind,
        }
        self._saving = Saving(config, run, task, self._engine, form, newest)
        if task.teacher is not None:
            task.teacher.masters(local_tensor)  # in fp32 from before the first rounding step on
        # Weights were drawn from one seed; dropout from here on differs by rank.
        torch.manual_seed(run.seed + 1000 * (run.rank + 1))

    def _build_optimizer(self) -> torch.optim.Optimizer:
        target = self.ds_config["zero_optimization"].get("offload_optimizer") or {}
        place = Place(
            self.run.device,
            stage=self.stage,
            precision=self.precision,
            offload=target.get("device", "none") != "none",
            weight_decay=self._optim.weight_decay,
        )
        name = self._optim.name
        kernels = choose_kernels(self.config.engine.fused, place, optimizer=name)
        if kernels.layer_norm == "apex":
            from apex.normalization import FusedLayerNorm

            swap_layer_norms(self.task, FusedLayerNorm)
        self._optimizer_kind = f"{name} ({kernels.optimizer})"
        return build_optimizer(
            self.task, self._optim, kernel=kernels.optimizer, offload=place.offload
        )

    @property
    def folder(self) -> Path:
        """Of the checkpoints."""
        return self._saving.folder

    @property
    def stage(self) -> int:
        return self.ds_config["zero_optimization"].get("stage", 0)

    @property
    def precision(self) -> str:
        return next((n for n in ("bf16", "fp16") if self.ds_config[n]["enabled"]), "fp32")

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by before they go backward; 1 but in fp16."""
        return float(getattr(self._engine.optimizer, "cur_scale", 1.0))

    def matmul_peak(self) -> float:
        """Operations a second of a large matrix product in the run's precision, measured now."""
        return matmul_peak(self.run.device, self._dtype)

    def teacher_distance(self) -> float | None:
        """How far the momentum twin is from the model, as a share of the model's own length, by
        what this rank holds of both: an even part of each weight, or all. None without a twin.
        """
        if self.task.teacher is None:
            return None
        apart, length = self.task.teacher.distance(self.task.model, local_tensor).tolist()
        return (apart / length) ** 0.5

    def total_samples(self, loader: TrainLoader) -> int:
        """Length of the run."""
        return duration_in_samples(self.config.schedule.length, loader.samples_per_epoch)

    def train_step(self, loader: TrainLoader) -> StepRecord:
        """Accumulate micro-batches, reduce, update: one optimizer step."""
        progress = Progress(self.step, self.samples_seen, loader.samples_per_epoch)
        self._keep_ratios = keep_ratios_at(
            self.config.pruning, progress.samples_seen, progress.samples_per_epoch
        )
        self._follow_schedule(loader)
        lr = learning_rate(
            self.samples_seen, self._optim, self.config.schedule, loader.samples_per_epoch
        )
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        seconds = dict.fromkeys(PHASES, 0.0)
        clock = _Clock(seconds, self.on_lap)
        losses: dict[str, Tensor] = {}
        logs: dict[str, Tensor] = {}
        text_tokens: Any = 0
        steps = self.plan.gradient_accumulation_steps
        if self._ahead is None or self._ahead.batches is not loader:
            self._ahead = self._prefetch(loader)
        batches = self._ahead
        if steps > 1 and self.task.cache.objectives:
            batches = self._run_first_pass([next(loader) for _ in range(steps)], progress, clock)
        for micro_step in range(steps):
            batch = next(batches)
            clock.lap("data")
            # Not when the loader has them: it reads ahead.
            self._bad.update((skipped.source, skipped.kind) for skipped in batch.skipped)
            text_tokens = text_tokens + batch.attention_mask.sum()
            with self._counted(batch, "step"):
                loss = self._engine(batch, progress.at(micro_step, steps))
                clock.lap("forward")
                self._engine.backward(loss.total)
                clock.lap("backward")
            batches.start_next()
            clock.lap("data")
            for total, part in ((losses, loss.values), (logs, loss.logs)):
                for name, value in part.items():
                    total[name] = total.get(name, 0.0) + value / steps
            self._engine.step()
            clock.lap("optimizer")
        applied = not getattr(self._engine.optimizer, "overflow", False)
        self.step += 1
        self.samples_seen += self.plan.global_batch_size
        if applied:
            after = Progress(self.step, self.samples_seen, loader.samples_per_epoch)
            self.task.after_step(after, local_tensor)
            if self.task.teacher is not None:
                refresh(self.task.teacher.parameters())
        else:
            self.task.drop_carries()
        clock.lap("optimizer")
        return StepRecord(
            step=self.step,
            samples_seen=self.samples_seen,
            epoch=self.samples_seen / loader.samples_per_epoch,
            losses=losses,
            logs=logs,
            learning_rate=lr,
            gradient_norm=self._engine.get_global_grad_norm(),
            seconds=seconds,
            kept_tokens=loss.kept_tokens,
            text_tokens=text_tokens,
            global_batch_size=self.plan.global_batch_size,
            applied=applied,
            bad_samples=self._bad.copy(),
        )

    def _follow_schedule(self, loader: TrainLoader) -> None:
        """Where pruning changes the plan may have another micro-batch: fewer tokens, more images.

        The global batch stays, and so does all that counts samples.
        """
        if not self.plan.later:
            return
        self.run.keep_ratios = self._keep_ratios
        plan = self.plan.at(self._keep_ratios)
        if plan == self.plan:
            return
        log.info(
            "micro-batch %d -> %d, accumulation %d -> %d from sample %d on",
            *(self.plan.micro_batch_size, plan.micro_batch_size),
            *(self.plan.gradient_accumulation_steps, plan.gradient_accumulation_steps),
            self.samples_seen,
        )
        self.use(plan)
        loader.seek(self.samples_seen, plan.micro_batches)
        self._ahead = None  # what it holds is of the old size

    def use(self, plan: Plan) -> None:
        """Go on with this one. Between two optimizer steps, never inside of one."""
        self.plan = plan
        settings = self._engine._config
        settings.train_micro_batch_size_per_gpu = plan.micro_batch_size
        settings.gradient_accumulation_steps = plan.gradient_accumulation_steps
        settings.train_batch_size = plan.global_batch_size
        self._engine.micro_steps = 0  # DeepSpeed finds a step's end by counting from here
        if hasattr(self._engine.optimizer, "gradient_accumulation_steps"):
            self._engine.optimizer.gradient_accumulation_steps = plan.gradient_accumulation_steps

    def _run_first_pass(
        self, batches: list[Batch], progress: Progress, clock: "_Clock"
    ) -> Prefetcher:
        """For objectives that want all micro-batches at once (see objectives/grad_cache.py)."""
        clock.lap("data")
        first = self._prefetch(iter(batches))
        with torch.no_grad():
            for micro_step, batch in enumerate(first):
                with self._counted(batch, "first pass"):
                    self._engine(batch, progress.at(micro_step, len(batches)), first_pass=True)
                first.start_next()
        with self._counted(batch, "settle"):
            self.task.cache.settle(progress)
        clock.lap("forward")
        return self._prefetch(iter(batches))

    def _counted(self, batch: Batch, kind: str) -> AbstractContextManager[None]:
        """A pass over a batch, of a kind."""
        if self.operations is None:
            return nullcontext()
        return self.operations.of((self._keep_ratios, tuple(batch.input_ids.shape), kind))

    def _prefetch(self, batches: Iterator[Batch]) -> Prefetcher:
        return Prefetcher(batches, self.run.device, self._dtype, self._side)

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES.get(self.precision, torch.float32)

    def resume(self, loader: TrainLoader) -> None:
        """Go on from the run's newest checkpoint, if there is one."""
        if self._saving.newest is None:
            return
        self.step, self.samples_seen = self._saving.load(loader)
        loader.seek(self.samples_seen, self.plan.micro_batches)
        self._ahead = None  # what it holds is of another place

    def save(self, loader: TrainLoader) -> Path | None:
        """Write a checkpoint (see Saving.save). Every rank calls it."""
        return self._saving.save(self.step, self.samples_seen, loader)

    def evaluate(self, held_out: HeldOut) -> dict[str, float]:
        """The task's held-out scores. Every rank calls it."""
        return self.task.evaluate(
            held_out,
            self.run.device,
            match_candidates=self.config.eval.match_candidates,
            prune=self.config.eval.prune,
        )


class _Clock:
    """Adds the time since the last lap to a phase, what collectives took of it to communication,
    and tells that the phase has ended.
    """

    def __init__(self, seconds: dict[str, float], on_lap: Callable[[str], None]) -> None:
        self._seconds, self._on_lap = seconds, on_lap
        self._last, self._last_collective = time.perf_counter(), dist.collective_seconds()

    def lap(self, phase: str) -> None:
        now, collective = time.perf_counter(), dist.collective_seconds()
        together = collective - self._last_collective
        self._seconds[phase] += now - self._last - together
        self._seconds["communication"] += together
        self._last, self._last_collective = now, collective
        self._on_lap(phase)
