"""Time and memory of training steps, on the CPU and on CUDA.

A step is data (host to device, and normalising), forward, backward, optimizer (with the update of
teacher and queue). Its images per second are by the wall clock, from a device with nothing to do to
a device that has done all.
"""

import contextlib
import ctypes
import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from workload import PROGRESS, NaiveTask

from elip_ds import dist
from elip_ds.batching import Plan
from elip_ds.config import Config
from elip_ds.data import Batch
from elip_ds.errors import UserError

PHASES = ("data", "forward", "backward", "optimizer")


def autocast(device: torch.device, dtype: str) -> Any:
    """What a forward runs under."""
    on = dtype == "autocast"
    return torch.autocast(device.type, torch.bfloat16) if on else contextlib.nullcontext()


def weight_dtype(dtype: str) -> torch.dtype:
    """bf16 rounds the weights, as DeepSpeed does; autocast keeps them."""
    return torch.bfloat16 if dtype == "bf16" else torch.float32


class BareLoop:
    """Forward, backward, torch's AdamW over all trainable parameters, without DeepSpeed.

    In bf16 the optimizer steps on the rounded weights; DeepSpeed's keeps fp32 ones beside them.
    optimizer: of a loop on the same parameters.
    """

    def __init__(
        self,
        task: nn.Module,
        config: Config,
        *,
        device: torch.device,
        dtype: str,
        compiled: bool,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        from elip_ds.engine.compile import compile_blocks
        from elip_ds.engine.optim import build_optimizer

        self.task: Any = task
        self._device, self._dtype = device, dtype
        if compiled:
            compile_blocks(task)
        self.optimizer = optimizer or build_optimizer(task, config.optim)

    def forward(self, batch: Batch) -> Tensor:
        with autocast(self._device, self._dtype):
            return self.task(batch, PROGRESS).total

    def backward(self, total: Tensor) -> None:
        total.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step(PROGRESS, lambda parameter: parameter.data)


class DeepSpeedLoop:
    """The same through deepspeed.initialize with a JSON of ds_configs, on one rank."""

    def __init__(
        self,
        task: Any,
        config: Config,
        *,
        json: str,
        batch_size: int,
        device: torch.device,
        dtype: str,
        compiled: bool,
    ) -> None:
        from elip_ds.engine import read_ds_config

        tree = read_ds_config(json)
        stage = tree.get("zero_optimization", {}).get("stage", 0)
        if stage == 3 and isinstance(task, NaiveTask):
            raise UserError(
                f"--deepspeed {json}: the naive step reads weights that ZeRO-3 has shards of only; "
                "use stage 0, 1 or 2, or --against unpruned"
            )
        import deepspeed

        from elip_ds.engine.compile import check_compile, compile_blocks
        from elip_ds.engine.ds_config import fill_ds_config
        from elip_ds.engine.optim import build_optimizer
        from elip_ds.engine.sharding import local_tensor, refresh

        dist.start(replace(dist.read_ranks(), device=device))
        settings = fill_ds_config(
            tree,
            engine=replace(config.engine, precision=dtype),
            optim=config.optim,
            plan=Plan(batch_size, 1, 1),
            device=device,
        )
        check_compile(compiled, stage)
        target = settings["zero_optimization"].get("offload_optimizer") or {}
        offload = target.get("device", "none") != "none"
        kernel = "deepspeed" if offload and device.type == "cuda" else "torch"
        optimizer = build_optimizer(task, config.optim, kernel=kernel, offload=offload)
        if compiled:
            compile_blocks(task)
        if device.type == "cpu":
            # It would compile a shared-memory all-reduce for over a minute; gloo has one.
            deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
        self._engine, *_ = deepspeed.initialize(model=task, optimizer=optimizer, config=settings)
        self.task = task
        if task.teacher is not None:
            task.teacher.masters(local_tensor)
        self._local, self._refresh = local_tensor, refresh

    def forward(self, batch: Batch) -> Tensor:
        return self._engine(batch, PROGRESS).total

    def backward(self, total: Tensor) -> None:
        self._engine.backward(total)

    def update(self) -> None:
        self._engine.step()
        self.task.after_step(PROGRESS, self._local)
        if self.task.teacher is not None:
            self._refresh(self.task.teacher.parameters())


def time_step(loop: Any, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """seconds: by phase, and total by the wall clock.  peak_bytes: most that was held; None where
    the machine does not say.  batch: on the host.
    """
    _reset_peak(device)
    clock = _Clock(device)
    moved = batch.to(device, dtype)
    clock.lap("data")
    total = loop.forward(moved)
    clock.lap("forward")
    loop.backward(total)
    clock.lap("backward")
    loop.update()
    clock.lap("optimizer")
    seconds = clock.seconds()
    return {"seconds": seconds, "peak_bytes": _peak(device)}


class _Clock:
    """On CUDA phases are timed on the device, so that the host may run ahead as in training."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._names = device, list[str]()
        self._synchronize()
        self._started = time.perf_counter()
        self._marks: list[Any] = [self._mark()]

    def lap(self, name: str) -> None:
        self._names.append(name)
        self._marks.append(self._mark())

    def seconds(self) -> dict[str, float]:
        self._synchronize()
        total = time.perf_counter() - self._started
        pairs = zip(self._names, self._marks[:-1], self._marks[1:], strict=True)
        return {name: self._between(a, b) for name, a, b in pairs} | {"total": total}

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) / 1000 if self._device.type == "cuda" else b - a

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError, AttributeError):  # not Linux, not glibc, or not allowed
        ctypes.CDLL(None).malloc_trim(0)  # what the last step freed would count as this one's
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int | None:
    """CUDA: of the allocator.  CPU: of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def matmul_peak(device: torch.device, dtype: torch.dtype, tries: int = 5) -> float:
    """Operations a second of a large square matrix product, the best of some tries."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(1 + tries):  # the first one warms up, and may be the best all the same
        clock = _Clock(device)
        a @ b
        clock.lap("product")
        best = max(best, 2 * side**3 / clock.seconds()["product"])
    return best


def summarise(
    steps: Mapping[str, list[dict[str, Any]]],
    *,
    batch_size: int,
    operations: Mapping[str, tuple[float, float]],
    peak: float,
) -> dict[str, dict[str, Any]]:
    """Of each variant's steps, taken in turns: medians, and how its times compare with the first
    variant's, pair by pair.

    operations: of one image, as counted and as needed.  peak: operations a second that the device
    has shown.
    """
    first = next(iter(steps))
    summary = {}
    for name, taken in steps.items():
        total = [step["seconds"]["total"] for step in taken]
        ratios = [
            mine / step["seconds"]["total"] for mine, step in zip(total, steps[first], strict=True)
        ]
        peaks = [step["peak_bytes"] for step in taken if step["peak_bytes"] is not None]
        middle = statistics.median(total)
        counted, needed = operations[name]
        summary[name] = {
            "images_per_second": batch_size / middle,
            "seconds": {
                phase: statistics.median(step["seconds"][phase] for step in taken)
                for phase in (*PHASES, "total")
            },
            "all_seconds": total,
            "peak_bytes": max(peaks) if peaks else None,
            "mfu": counted * batch_size / middle / peak,
            "needed_mfu": needed * batch_size / middle / peak,
            "time_against_first": {
                "median": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            },
        }
    return summary
