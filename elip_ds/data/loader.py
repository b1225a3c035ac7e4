"""Sources -> batches: one endless training stream, one pass over the held-out pairs.

The main process decides which sample comes where (order.py); worker processes read, decode, crop
and tokenize (pairs.py). Samples that could not be used are counted; too many of them stop the run.
"""

import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from elip_ds import dist
from elip_ds.config.schema import DataConfig
from elip_ds.data.batch import Batch, Skipped, stable_hash
from elip_ds.data.corpus import Source
from elip_ds.data.order import Place, SampleOrder, rank_batches
from elip_ds.data.pairs import PairDataset
from elip_ds.data.record import PASSING
from elip_ds.data.text import CaptionTokenizer
from elip_ds.data.vocabulary import Vocabulary
from elip_ds.errors import PassingError, UserError
from elip_ds.run import Run

log = logging.getLogger(__name__)

CHECK_EVERY = 10
"Optimizer steps between two looks at the share of bad samples of all ranks."
PREFETCH = 4
"Batches that a worker makes ahead."
MIN_READ = 200
"Samples read before the share of bad ones may stop a run."


class Intake:
    """Counts what comes from the workers: samples read, and the bad ones by source and kind."""

    def __init__(self, run: Run, max_bad_share: float) -> None:
        self.read = 0
        self.bad: Counter[tuple[str, str]] = Counter()
        self._run, self._max_bad_share = run, max_bad_share
        self._met: set[Skipped] = set()
        self._reasons: Counter[str] = Counter()

    def clear(self) -> None:
        """Count from 0 again."""
        self.read = 0
        self.bad.clear()

    def take(self, batch: Batch | UserError) -> Batch:
        """The batch, counted. Raises UserError when it is one; alone also as check does."""
        if isinstance(batch, UserError):
            if not self._run.first:
                log.error(batch)  # the entry prints errors of rank 0 only
            raise batch
        self.read += len(batch) + len(batch.skipped)
        for skipped in batch.skipped:
            self.bad[skipped.source, skipped.kind] += 1
            self._reasons[skipped.reason] += 1
            if skipped not in self._met:
                self._met.add(skipped)
                self._run.note_skipped(skipped.shard, skipped.key, skipped.reason)
        if self._run.world_size == 1:
            self._check(self.read, self.bad.total(), self._passing)
        return batch

    @property
    def _passing(self) -> int:
        return sum(count for (_, kind), count in self.bad.items() if kind in PASSING)

    def check(self) -> None:
        """Raises UserError on all ranks together when too much of what they read was bad. Every
        rank calls it.
        """
        counts = torch.tensor([self.read, self.bad.total(), self._passing], device=self._run.device)
        self._check(*dist.sum_over_ranks(counts).tolist())

    def _check(self, read: int, bad: int, passing: int) -> None:
        if read >= MIN_READ and bad > self._max_bad_share * read:
            most = f"most often: {self._reasons.most_common(1)[0][0]}; " if self._reasons else ""
            raise (PassingError if 2 * passing > bad else UserError)(
                f"{bad} of {read} samples read cannot be used, more than "
                f"data.max_bad_share={self._max_bad_share}; {most}see {self._run.dir}/skipped.jsonl"
            )


class TrainLoader:
    """Endless micro-batches of this rank, from any position of the run."""

    def __init__(
        self,
        dataset: PairDataset,
        order: SampleOrder,
        run: Run,
        *,
        micro_batches: Sequence[int],
        workers: int,
        max_bad_share: float,
    ) -> None:
        """micro_batches: the ranks' sizes."""
        self.dataset, self.order = dataset, order
        self.samples_per_epoch = order.samples_per_epoch
        self._run, self._micro_batches, self._workers = run, micro_batches, workers
        self._intake = Intake(run, max_bad_share)
        self._batches: Iterator[Batch | UserError] | None = None

    @property
    def bad(self) -> Counter[tuple[str, str]]:
        """Samples that this rank could not use since its start, by source and kind."""
        return self._intake.bad

    @property
    def ready(self) -> int:
        """Batches that the workers have made and nobody has taken yet; 0 without workers."""
        queue = getattr(self._batches, "_data_queue", None)  # of torch's iterator with workers
        early = getattr(self._batches, "_task_info", {})  # made before their turn: (worker, batch)
        return (queue.qsize() if queue else 0) + sum(len(task) == 2 for task in early.values())

    def shard_positions(self, samples_seen: int) -> dict[str, tuple[float, int]]:
        """source -> how many shards of its present pass are behind, on average over the window in
        which samples are shuffled, and how many there are.
        """
        positions = {}
        for source, size in zip(self.dataset.sources, self.order.sources, strict=True):
            visits = samples_seen * size.per_epoch / self.samples_per_epoch
            share = visits % size.samples / size.samples
            positions[source.name] = share * len(size.shards), len(size.shards)
        return positions

    def check(self, step: int) -> None:
        """Every few steps all ranks hear how much was bad. Every rank calls it. Raises UserError
        on all of them when it is too much.
        """
        if step % CHECK_EVERY == 0:
            self._intake.check()

    def seek(self, samples_seen: int, micro_batches: Sequence[int] | None = None) -> None:
        """Go on behind so many samples of the run, in batches of other sizes if they are given;
        without it a run starts at 0.
        """
        self._micro_batches = micro_batches or self._micro_batches
        batches = rank_batches(
            self.order, samples_seen, micro_batches=self._micro_batches, rank=self._run.rank
        )
        self._batches = _start_batches(self.dataset, batches, self._workers, self._run)

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self.seek(0)
        assert self._batches is not None
        return self._intake.take(next(self._batches))

    def state(self) -> dict[str, Any]:
        """What the data must still look like for a saved position to mean the same."""
        sources = self.order.sources
        return {
            "samples": [source.samples for source in sources],
            "shards": [stable_hash(str(source.shards)) for source in sources],
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises UserError when the training data are not those of the checkpoint."""
        here = self.state()
        if state["samples"] != here["samples"]:
            raise UserError(
                f"data.train holds {here['samples']} samples, the checkpoint's run had "
                f"{state['samples']}: its position has no meaning there"
            )
        if "shards" in state and state["shards"] != here["shards"]:  # older checkpoints lack it
            raise UserError(
                "data.train holds as many samples as the checkpoint's run had, in shards of other "
                "sizes: its position has no meaning there"
            )


class HeldOut:
    """One pass over the held-out pairs, shared among the ranks, equally many batches on each.

    Iterates over Batch; row i of rank r is pair i * world_size + r, and repeats of the last pair
    fill up the end. len() is the number of pairs.
    """

    def __init__(
        self,
        dataset: PairDataset,
        run: Run,
        *,
        size: int,
        batch_size: int,
        workers: int,
        max_bad_share: float,
    ) -> None:
        self.dataset, self.size, self._run = dataset, size, run
        self._batch_size, self._workers = batch_size, workers
        self._intake = Intake(run, max_bad_share)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Batch]:
        self._intake.clear()
        places = self._places()
        step = self._batch_size
        batches = (places[i : i + step] for i in range(0, len(places), step))
        for batch in _start_batches(self.dataset, batches, self._workers, self._run):
            yield self._intake.take(batch)
        self._intake.check()

    def _places(self) -> list[Place]:
        """This rank's pairs, as many as every other rank has."""
        starts = np.cumsum([0, *(source.size.samples for source in self.dataset.sources)])
        world, rank = self._run.world_size, self._run.rank
        places = []
        for i in range(rank, -(-self.size // world) * world, world):
            pair = min(i, self.size - 1)
            source = int(np.searchsorted(starts, pair, side="right")) - 1
            places.append(Place(source, pair - int(starts[source]), 0))
        return places


def _start_batches(
    dataset: PairDataset, batches: Iterable[list[Place]], workers: int, run: Run
) -> Iterator[Batch]:
    """Torch's iterator, whose workers run already."""
    loader = DataLoader(
        dataset,
        sampler=batches,
        batch_size=None,  # the dataset makes whole batches
        num_workers=workers,
        worker_init_fn=_start_worker,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=run.device.type == "cuda",
        # The loader draws a number at its start. From the global generator that would shift what a
        # resumed run draws after it.
        generator=torch.Generator(),
    )
    # Processes that start meanwhile do not hear TERM, in any thread of theirs: at Ctrl-C
    # DeepSpeed's launcher sends it to a rank's children, too, and a rank without workers cannot do
    # the steps until it saves.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_: int) -> None:
    # Signals are for the ranks, which stop in an orderly way; a worker ends with its rank.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)


def _end_when_told_by(rank: int) -> None:
    """TERM counts where the rank sends it, as torch does when a worker does not end by itself."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        pass
    os._exit(0)


def build_loaders(
    config: DataConfig,
    sources: dict[str, list[Source]],
    vocabulary: Vocabulary,
    run: Run,
    *,
    image_size: tuple[int, int],
    micro_batches: Sequence[int],
    eval_batch_size: int,
    max_eval: int | None,
) -> tuple[TrainLoader, HeldOut]:
    """The training stream and the held-out pairs of a run.

    image_size: height, width.  micro_batches: the ranks' sizes.
    """
    tokenizer = CaptionTokenizer(vocabulary, config.text_length)
    train, val = (
        PairDataset(
            sources[split],
            tokenizer,
            config,
            image_size=image_size,
            seed=run.seed,
            augment=split == "train",
        )
        for split in ("train", "val")
    )
    order = SampleOrder([s.size for s in sources["train"]], run.seed, config.shuffle_shards)
    reading: dict[str, Any] = {"workers": config.workers, "max_bad_share": config.max_bad_share}
    loader = TrainLoader(train, order, run, micro_batches=micro_batches, **reading)
    size = sum(source.size.samples for source in sources["val"])
    size = size if max_eval is None else min(size, max_eval)
    return loader, HeldOut(val, run, size=size, batch_size=eval_batch_size, **reading)
