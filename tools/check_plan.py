"""Hold the plan to what is really allocated, on the CPU.

    python tools/check_plan.py                       # everything, an hour on one core
    python tools/check_plan.py --only step           # a task's step without DeepSpeed
    python tools/check_plan.py --only engine --stages 2 3 --worlds 2 8

Every case runs in processes of its own. `step`: forward, backward and the twin's update. `engine`:
the third optimizer step of the real engine, of two gloo ranks, or of the first of many ranks of a
process group that sends nothing. Exits with 1 if a bound is missed.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from allocations import Allocations, counting
from torch.nn.attention import SDPBackend, sdpa_kernel

from elip_ds import dist
from elip_ds.batching.memory import PHASES
from elip_ds.batching.zero import Zero, read_zero
from elip_ds.config import load_config
from elip_ds.data.made_up import made_up_vocabulary, random_batch
from elip_ds.launching.tracing import LATE, Setting, StepTracer, cast_parameters
from elip_ds.tasks import build_pretrain

ROOT = Path(__file__).parents[1]
SMALL = ["preset=albef_4m", "model.vision.width=192", "model.text.width=192"]
SMALL += ["model.vision.heads=3", "model.text.heads=3"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BOUNDS = {"step": (-0.005, 0.005), "engine": (-0.005, 0.05)}
"Share of the highest peak by which a prediction may be below and above it."
SHIPPED = 50_000_000
"Elements of a bucket in ds_configs."
IN_PROPORTION = 4_000_000
"To the small model's 18 million parameters what those are to ALBEF's."


@dataclass(frozen=True)
class Case:
    """words: of the configuration.  world_size: 0 for a step without DeepSpeed, 2 for real ranks,
    more for the first of as many that are not there.
    """

    words: list[str] = field(default_factory=lambda: list(SMALL))
    size: int = 8
    precision: str = "fp32"
    attention: str = "fused"
    world_size: int = 0
    stage: int = 0
    accumulation: int = 1
    bucket: int = IN_PROPORTION

    @property
    def name(self) -> str:
        extra = " ".join(w for w in self.words if w not in SMALL)
        kind = (
            f"N={self.world_size} stage {self.stage} bucket={self.bucket:.0e}"
            if self.world_size
            else self.attention
        )
        return f"{kind} {self.precision} b={self.size} gas={self.accumulation} {extra}".strip()


def step_cases() -> list[Case]:
    cheap = [*SMALL, "model.vision.recompute=cheap", "model.text.recompute=cheap"]
    full = [*SMALL, "model.vision.recompute=full", "model.text.recompute=full"]
    return [
        Case(),
        Case(words=[*SMALL, "pruning.stages=[]"]),
        Case(attention="eager"),
        Case(precision="bf16"),
        Case(words=[*SMALL, "pruning.stages=[]"], precision="bf16", attention="eager"),
        Case(words=cheap, precision="bf16"),
        Case(words=full),
        Case(words=[*SMALL, "objectives.itc.queue_size=0"]),
    ]


def engine_cases(worlds: list[int], stages: list[int], precisions: list[str]) -> list[Case]:
    """At stage 3 also with the shipped buckets, which are larger than the small model."""
    return [
        Case(world_size=world, stage=stage, precision=precision, bucket=bucket)
        for world in worlds
        for stage in stages
        for bucket in ((IN_PROPORTION, SHIPPED) if stage == 3 else (IN_PROPORTION,))
        for precision in precisions
    ]


# In a case's own process.


def measure_step(case: Case) -> dict[str, int]:
    """Peaks of the second step, by phase, parameters and all."""
    config, dtype = load_config(case.words), DTYPES[case.precision]
    vocabulary = made_up_vocabulary(config)
    host = random_batch(config, vocabulary, case.size)
    attention = sdpa_kernel(SDPBackend.MATH) if case.attention == "eager" else nullcontext()
    allocations = Allocations()
    with attention:
        torch.manual_seed(0)
        task = build_pretrain(config, vocabulary).train()
        cast_parameters(task, dtype)
        if task.teacher is not None:
            task.teacher.masters(lambda parameter: parameter.data)
        for _ in range(2):
            allocations.mark("before")
            batch = host.to(torch.device("cpu"), dtype)
            loss = task(batch, LATE)
            assert loss is not None
            allocations.mark("forward")
            loss.total.backward()
            del loss
            allocations.mark("backward")
            for parameter in task.parameters():
                parameter.grad = None
            task.after_step(LATE, lambda parameter: parameter.data)
            allocations.mark("step")
            del batch
    return {name: peak for name, peak, _ in allocations.peaks()[-len(PHASES) :]}


class _SameBatch:
    """A loader of one batch, for ever."""

    samples_per_epoch, bad = LATE.samples_per_epoch, 0

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __iter__(self) -> "_SameBatch":
        return self

    def __next__(self) -> Any:
        return self._batch


def measure_engine(case: Case) -> tuple[dict[str, int], dict[str, Any]]:
    """Peaks of the third optimizer step by phase, and the complete DeepSpeed configuration."""
    from elip_ds.batching import Plan
    from elip_ds.engine import Engine, engine, read_ds_config
    from elip_ds.run import Run

    rank, world = _join(case)
    total = case.size * case.accumulation * world
    own = [f"engine.precision={case.precision}", f"batching.global_batch_size={total}"]
    config = load_config([*case.words, *own, "metrics.port=null"])
    vocabulary = made_up_vocabulary(config)
    tree = read_ds_config(str(ROOT / f"ds_configs/z{case.stage}.json"))
    if case.stage:
        tree["zero_optimization"]["reduce_bucket_size"] = case.bucket
    if case.stage == 3:
        tree["zero_optimization"]["stage3_prefetch_bucket_size"] = case.bucket
    loader: Any = _SameBatch(random_batch(config, vocabulary, case.size))
    allocations = Allocations()
    with tempfile.TemporaryDirectory() as folder:

        class Clock(engine._Clock):
            def lap(self, phase: str) -> None:
                super().lap(phase)
                allocations.mark(phase)

        engine._Clock = Clock  # type: ignore[misc]
        ranks = dist.Ranks(rank, rank, world, world, torch.device("cpu"))
        built = Engine(
            config,
            tree,
            build_pretrain(config, vocabulary).train(),
            Plan(case.size, case.accumulation, world),
            Run(ranks, Path(folder), config.run.seed),
        )
        built.samples_seen = LATE.samples_seen
        for step in range(3):
            allocations.mark(f"step {step}")
            built.train_step(loader)
    laps = allocations.peaks()
    last = [name for name, _, _ in laps].index("step 2")
    peaks = dict.fromkeys(PHASES, 0)
    for name, peak, _ in laps[last + 1 :]:
        phase = {"optimizer": "step", "data": ""}.get(name, name)
        if phase:
            peaks[phase] = max(peaks[phase], peak)
    return peaks, built.ds_config


def _join(case: Case) -> tuple[int, int]:
    """This process's rank, and how many there are or seem to be."""
    import torch.distributed as td

    rank = int(os.environ["RANK"])
    if case.world_size == 2:
        td.init_process_group("gloo", rank=rank, world_size=2)
    else:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        td.init_process_group("fake", rank=0, world_size=case.world_size, store=FakeStore())

        def gather_mine(values: list[Any], value: Any, group: Any = None) -> None:
            values[:] = [value] * len(values)

        td.all_gather_object = gather_mine  # type: ignore[assignment]
    return rank, case.world_size


def run_case(case: Case) -> dict[str, Any]:
    """Measured and predicted peaks by phase, and the errors of the highest and of each phase."""
    if case.world_size:
        measured, ds_config = measure_engine(case)
        zero = read_zero(ds_config, case.world_size, DTYPES[case.precision])
    else:
        measured = measure_step(case)
        zero = Zero(stage=0, world_size=0, dtype=DTYPES[case.precision])
    setting = Setting(zero, "cpu", case.attention, case.accumulation)
    predicted = StepTracer(load_config(case.words), setting).predict(case.size)
    peaks = asdict(predicted.peaks)
    if not case.world_size:  # no engine, no optimizer: the weights and what the step makes
        held = predicted.held_bytes - predicted.parts["optimizer"]
        peaks = {name: peak - predicted.held_bytes + held for name, peak in peaks.items()}
    errors = {name: peaks[name] / measured[name] - 1 for name in measured}
    highest = max(peaks.values()) / max(measured.values()) - 1
    return {"measured": measured, "predicted": peaks, "errors": errors, "error": highest}


# In the first process.


def in_own_processes(case: Case, timeout_seconds: float = 900) -> dict[str, Any]:
    """run_case, in as many processes as the case has real ranks."""
    real = 2 if case.world_size == 2 else 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-W", "ignore", __file__, "--case", json.dumps(asdict(case))]
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        counted = counting(Path(folder))
        for rank in range(real):
            env = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(max(case.world_size, 1)),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
                **counted,
            }
            out = Path(folder, f"rank{rank}.json")
            arguments = [*command, "--out", str(out)]
            with Path(folder, f"rank{rank}.log").open("w") as log:
                process = subprocess.Popen(arguments, env=env, stdout=log, stderr=log)
            processes.append(process)
        try:
            codes = [process.wait(timeout_seconds) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise RuntimeError(f"{case.name}: {Path(folder, 'rank0.log').read_text()[-2000:]}")
        return json.loads(Path(folder, "rank0.json").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(BOUNDS))
    parser.add_argument("--worlds", type=int, nargs="*", default=[2, 8, 64])
    parser.add_argument("--stages", type=int, nargs="*", default=[0, 1, 2, 3])
    parser.add_argument("--precisions", nargs="*", default=list(DTYPES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.case:
        args.out.write_text(json.dumps(run_case(Case(**json.loads(args.case)))))
        sys.stdout.flush()
        os._exit(0)  # gloo's and DeepSpeed's threads are not waited for
    cases = {
        "step": step_cases(),
        "engine": engine_cases(args.worlds, args.stages, args.precisions),
    }
    results, missed = [], 0
    for kind, (low, high) in BOUNDS.items():
        for case in cases[kind] if args.only in (None, kind) else ():
            result = in_own_processes(case)
            good = low <= result["error"] <= high
            missed += not good
            results.append({"case": asdict(case), **result})
            phases = "  ".join(f"{name} {x:+.2%}" for name, x in result["errors"].items())
            print(
                f"{'ok  ' if good else 'MISS'} {case.name:44} {result['error']:+.2%}   ({phases})",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
