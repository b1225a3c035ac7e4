"""Real optimizer steps on made-up worst-case batches, and the most memory that each phase took.

    python -m elip_ds.engine.trial FOLDER

is what every rank of a probe runs, in a process group that lives for nothing else (see
launching/local_ranks.py). The engine, the task and the steps are those of training; the batches are
made up, with the longest captions. trial_job.py says what FOLDER holds.

Peaks are bytes of a rank: on CUDA what the allocator handed out and what lies outside of it, on a
CPU resident memory (VmHWM), libraries included. That of a phase holds also for the data that come
before it, evaluating counts as forward and saving as step.
"""

import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Iterator
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elip_ds import dist
from elip_ds.batching import Plan
from elip_ds.config import Config
from elip_ds.data import Batch, Vocabulary
from elip_ds.data.batch import shortest_length
from elip_ds.data.made_up import made_up_vocabulary, random_batch
from elip_ds.engine.engine import Engine
from elip_ds.engine.heap import return_at_once
from elip_ds.engine.out_of_memory import is_out_of_memory, leave_out_of_memory, write_whole
from elip_ds.engine.rank_memory import CudaMemory, HostMemory
from elip_ds.engine.trial_job import ERROR_STATUS, TrialJob, read_job
from elip_ds.errors import leave
from elip_ds.logs import setup_logging
from elip_ds.run import TOKENIZER, Run, seed_everything
from elip_ds.tasks import build_pretrain, min_micro_batch
from elip_ds.towers.pruning import at_ratios

SAMPLES_SEEN = 10**9
"Where a trial pretends to be: long after every warm-up and ramp."
SAMPLES_PER_EPOCH = 10**6
WARM_UP_STEPS = 2


class Watch:
    """Told where a trial is: keeps the peaks of each phase, and the heartbeat on disk."""

    def __init__(self, folder: Path, rank: int, memory: HostMemory | CudaMemory) -> None:
        self.folder, self.rank, self.memory = folder, rank, memory
        self.peaks: dict[str, int] = {}
        self.where: dict[str, Any] = {"micro_batch_size": None, "phase": "start", "step": 0}
        self.where["starting"] = True
        self._last = ""

    def at(self, phase: str, **where: int | None) -> None:
        """Before anything that may be the end of this process."""
        self.where |= {"phase": phase, **where}
        beat = self.where | {"time": time.time(), "pid": os.getpid()}
        write_whole(self.folder / f"heartbeat-{self.rank}.json", beat)

    def lap(self, ended: str) -> None:
        """ended: a part of a step, as Engine.on_lap tells it."""
        coming = {"forward": "backward", "backward": "step", "optimizer": "step"}.get(ended)
        if coming is None:  # data: the next are fetched after the backward pass, too
            coming = "step" if self._last == "backward" else "forward"
        self._last = ended
        self.note({"data": coming, "optimizer": "step"}.get(ended, ended))
        self.at(coming)

    def note(self, phase: str) -> None:
        """What was in use since the last call was in use for this phase."""
        self.peaks[phase] = max(self.peaks.get(phase, 0), self.memory.peak())
        self.memory.reset()


class _Stream:
    """In place of a TrainLoader."""

    samples_per_epoch, bad = SAMPLES_PER_EPOCH, 0

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return self._batches

    def __next__(self) -> Batch:
        return next(self._batches)

    def state(self) -> dict[str, Any]:
        return {}


class _Pairs:
    """In place of held-out pairs: one batch on every rank."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return len(self._batch) * dist.world_size()

    def __iter__(self) -> Iterator[Batch]:
        yield self._batch


def run_trial(job: TrialJob, ranks: dist.Ranks, watch: Watch) -> None:
    """All of the job, its results in result-RANK.json. Raises whatever a step raises."""
    config = _worst_case(job)
    vocabulary = made_up_vocabulary(config)
    smallest = min_micro_batch(config)
    engine = _build_engine(job, config, vocabulary, ranks, folder=watch.folder / "run")
    engine.on_lap = watch.lap
    # The first step makes the optimizer's states and loads kernels, the second has both: what
    # comes once is there before anything is counted, and before the limit is drawn.
    watch.at("warm-up", micro_batch_size=job.sizes[0])
    first = repeat(random_batch(config, vocabulary, smallest))
    _, applied = _run_steps(engine, first, WARM_UP_STEPS, watch)
    if not applied:
        raise RuntimeError("the step overflowed, so that nothing was seen of the optimizer")
    watch.where["starting"] = False
    watch.memory.settle()
    if job.limit_bytes is not None:
        watch.at("limit")
        watch.memory.limit(job.limit_bytes)
    points: list[dict[str, Any]] = []
    for size in job.sizes:
        engine.use(Plan(size, job.accumulation, ranks.world_size))
        started = time.perf_counter()
        watch.where["starting"] = config.engine.compile  # again for each size, in silence
        watch.at("forward", micro_batch_size=size, step=0)
        longest = random_batch(config, vocabulary, size)
        watch.memory.reset()
        watch.peaks.clear()
        stream, _ = _run_steps(engine, _batches(job, longest, config, vocabulary), job.steps, watch)
        if job.evaluate and size == job.sizes[-1]:
            watch.at("forward")
            pairs: Any = _Pairs(random_batch(config, vocabulary, config.eval.batch_size))
            engine.evaluate(pairs)
            watch.note("forward")
        if job.save and size == job.sizes[-1]:
            watch.at("step")
            if engine.save(stream) is None:
                raise RuntimeError(f"no checkpoint can be written to {engine.folder}")
            watch.note("step")
        seconds = time.perf_counter() - started
        point = {"micro_batch_size": size, "peaks": dict(watch.peaks), "seconds": seconds}
        points.append(point | watch.memory.more())
        record = {"device": watch.memory.device(), "points": points}
        write_whole(watch.folder / f"result-{ranks.rank}.json", record)
        dist.barrier()  # who runs out at the next size leaves none behind that has not written
    dist.stop()


def _run_steps(
    engine: Engine, batches: Iterator[Batch], steps: int, watch: Watch
) -> tuple[Any, bool]:
    """Steps, 1 or more. Returns what stands for a loader, and whether the last step was applied."""
    stream: Any = _Stream(batches)
    for step in range(steps):
        watch.at("forward", step=step)
        engine.samples_seen = SAMPLES_SEEN
        record = engine.train_step(stream)
    return stream, record.applied


def _worst_case(job: TrialJob) -> Config:
    """Fresh weights, as large as loaded ones, and pruning where it prunes least."""
    config = job.config
    ratios = job.keep_ratios
    if ratios is None:
        ratios = [stage.keep_ratio for stage in config.pruning.stages]
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, init_from=[]),
        pruning=at_ratios(config.pruning, ratios),
    )


def _build_engine(
    job: TrialJob, config: Config, vocabulary: Vocabulary, ranks: dist.Ranks, *, folder: Path
) -> Engine:
    dist.start(ranks)
    run = Run(ranks, folder, config.run.seed)
    folder.mkdir(exist_ok=True)
    if run.first:
        run.write_text(folder / TOKENIZER, vocabulary.json)  # a checkpoint holds it
    seed_everything(run.seed)
    task = build_pretrain(config, vocabulary)
    plan = Plan(job.sizes[0], job.accumulation, ranks.world_size)
    return Engine(config, _unscaled(job.deepspeed), task, plan, run)


def _unscaled(tree: dict[str, Any]) -> dict[str, Any]:
    """Without a loss scale that looks for its value: steps that overflow, as the first ones of fp16
    do, are skipped, and the optimizer would have no states when memory is measured.
    """
    fp16 = tree.get("fp16", {}) | {"loss_scale": 1}
    return tree | {"fp16": fp16} if tree.get("fp16", {}).get("enabled", "auto") else tree


def _batches(
    job: TrialJob, longest: Batch, config: Config, vocabulary: Vocabulary
) -> Iterator[Batch]:
    """For ever, as job.captions says."""
    if job.captions == "random":
        return _random_lengths(longest, config, vocabulary)
    batches = [longest] * job.accumulation
    if job.captions == "alternate":
        ends = torch.full((len(longest),), _shortest_caption(vocabulary))
        batches += [_cut(longest, ends, config, vocabulary)] * job.accumulation
    return cycle(batches)


def _random_lengths(longest: Batch, config: Config, vocabulary: Vocabulary) -> Iterator[Batch]:
    """The longest of a batch is drawn first, or it would hardly ever be short, then the others."""
    generator = torch.Generator().manual_seed(dist.rank())
    least, most = _shortest_caption(vocabulary), longest.input_ids.shape[1]
    while True:
        top = int(torch.randint(least, most + 1, (1,), generator=generator))
        ends = torch.randint(least, top + 1, (len(longest),), generator=generator)
        ends[0] = top
        yield _cut(longest, ends, config, vocabulary)


def _shortest_caption(vocabulary: Vocabulary) -> int:
    """Tokens of one word with what stands around it."""
    return 2 if vocabulary.end_id is None else 3


def _cut(batch: Batch, ends: Tensor, config: Config, vocabulary: Vocabulary) -> Batch:
    """With captions of so many tokens each, padded as the configuration says. ends: (B,)"""
    ids, mask = batch.input_ids.clone(), batch.attention_mask.clone()
    if vocabulary.end_id is not None:
        ids[torch.arange(len(ends)), ends - 1] = vocabulary.end_id
    padding = torch.arange(ids.shape[1]) >= ends[:, None]
    ids[padding] = vocabulary.special_ids["[PAD]"]
    mask[padding] = 0
    short = dataclasses.replace(batch, input_ids=ids, attention_mask=mask)
    return short.shortened(shortest_length(mask)) if config.data.pad == "longest" else short


def main(argv: list[str]) -> None:
    folder, ranks = Path(argv[0]), dist.read_ranks()
    setup_logging(ranks.rank)
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    else:
        return_at_once()  # as training does where it takes what is measured here
    memory = CudaMemory(ranks.device) if ranks.device.type == "cuda" else HostMemory()
    watch = Watch(folder, ranks.rank, memory)
    watch.at("start")
    try:
        run_trial(read_job(folder), ranks, watch)
    except Exception as error:
        memory.unlimit()
        where = watch.where | {"time": time.time()}
        if is_out_of_memory(error):
            in_use, peak = memory.in_use(), max([memory.peak(), *watch.peaks.values()])
            leave_out_of_memory(
                folder, ranks.rank, error, **where, in_use_bytes=in_use, peak_bytes=peak
            )
        traceback.print_exc()
        last = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        record = where | {"kind": type(error).__name__, "message": str(error), "last_line": last}
        write_whole(folder / f"error-{ranks.rank}.json", record | {"rank": ranks.rank})
        os._exit(ERROR_STATUS)  # at once: the peers may wait in a collective


if __name__ == "__main__":
    main(sys.argv[1:])
    leave()
