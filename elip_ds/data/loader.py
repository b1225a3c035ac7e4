"""Shards -> batches: one endless training stream, one pass over the held-out pairs.

The main process decides which sample comes where (order.py); worker processes read, decode, crop and
tokenize. A sample that cannot be used is replaced by the next one of its source, named in the batch,
and counted; too many of them stop the run.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from elip_ds.config.schema import DataConfig, ShardSource
from elip_ds.data.augment import eval_image, keyed_generator, train_image
from elip_ds.data.batch import Batch, Skipped, stable_hash
from elip_ds.data.builtin import builtin_shards
from elip_ds.data.decode import decode_image
from elip_ds.data.order import Place, SampleOrder, SourceSize, rank_batches
from elip_ds.data.shards import BadSample, ShardReader, count_samples, expand_shards
from elip_ds.data.text import CaptionTokenizer, Vocabulary, learn_vocabulary, read_vocabulary
from elip_ds.errors import UserError
from elip_ds.run import Run

OPEN_SHARDS = 32
"Shards that one worker keeps open."
MIN_READ = 200
"Samples read before the share of bad ones may stop a run."


@dataclass(frozen=True)
class Source:
    """name: as the config has it.  shards, counts: tar files and the samples in each."""

    name: str
    shards: tuple[Path, ...]
    counts: tuple[int, ...]
    weight: float

    @property
    def size(self) -> SourceSize:
        return SourceSize(self.counts, self.weight)


def open_sources(config: DataConfig, run: Run) -> dict[str, list[Source]]:
    """The sources of both splits, found and counted. Raises UserError for a missing or empty one."""
    if any(entry.shards == "builtin" for entry in [*config.train, *config.val]):
        builtin = builtin_shards(config.builtin, run)
    splits: dict[str, list[Source]] = {}
    for split, entries in (("train", config.train), ("val", config.val)):
        splits[split] = []
        for entry in entries:
            shards = (
                builtin[split]
                if entry.shards == "builtin"
                else expand_shards(entry.shards, f"data.{split}")
            )
            splits[split].append(_open(entry, shards, f"data.{split}"))
    return splits


def _open(entry: ShardSource, shards: list[Path], key: str) -> Source:
    counts = count_samples(shards, key)
    return Source(entry.shards, tuple(shards), tuple(counts), entry.weight)


def build_vocabulary(
    config: DataConfig, sources: dict[str, list[Source]], run: Run, size: int
) -> Vocabulary:
    """The file that the config names, or one learned from the training captions, kept with the run."""
    path = run.dir / "vocab.txt"
    if config.vocabulary != "auto":
        path = Path(config.vocabulary)
    elif run.first and not path.exists():
        words = learn_vocabulary(_captions(sources["train"]), size).words
        run.write_text(path, "\n".join(words) + "\n")
    run.wait()
    vocabulary = read_vocabulary(path)
    if len(vocabulary) > size:
        raise UserError(
            f"data.vocabulary={path} has {len(vocabulary)} entries, model.text.vocab_size={size}; "
            f"set model.text.vocab_size={len(vocabulary)}"
        )
    return vocabulary


def _captions(sources: Sequence[Source]) -> Iterator[str]:
    from elip_ds.data.text import clean_caption

    for source in sources:
        for path in source.shards:
            reader = ShardReader(path)
            for i in range(len(reader)):
                try:
                    yield from (clean_caption(c) for c in reader.read(i).captions)
                except BadSample:
                    continue
            reader.close()


class PairDataset(Dataset):
    """Place -> example, in a worker process. augment: crop, mirror and caption drawn at random."""

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: CaptionTokenizer,
        config: DataConfig,
        *,
        image_size: int,
        seed: int,
        augment: bool,
    ) -> None:
        self.sources, self.tokenizer, self.config = list(sources), tokenizer, config
        self.image_size, self.seed, self.augment = image_size, seed, augment
        self._starts = [np.concatenate([[0], np.cumsum(s.counts)]) for s in self.sources]
        self._readers: dict[Path, ShardReader] = {}

    def __getitem__(self, place: Place) -> dict[str, Any]:
        skipped: list[Skipped] = []
        size = self.sources[place.source].size.samples
        for ahead in range(size):
            shard, at = self._locate(place.source, (place.sample + ahead) % size)
            key = f"#{at}"
            try:
                reader = self._reader(shard)
                key = reader.key(at)
                return self._example(reader, at, place) | {"skipped": skipped}
            except (BadSample, OSError, ValueError, SyntaxError, IndexError) as error:
                skipped.append(Skipped(str(shard), key, _reason(error)))
        raise UserError(f"data: no sample of {self.sources[place.source].name} can be used")

    def _locate(self, source: int, sample: int) -> tuple[Path, int]:
        starts = self._starts[source]
        shard = int(np.searchsorted(starts, sample, side="right")) - 1
        return self.sources[source].shards[shard], sample - int(starts[shard])

    def _reader(self, path: Path) -> ShardReader:
        reader = self._readers.pop(path, None) or ShardReader(path)
        self._readers[path] = reader  # most recently used last
        if len(self._readers) > OPEN_SHARDS:
            self._readers.pop(next(iter(self._readers))).close()
        return reader

    def _example(self, reader: ShardReader, at: int, place: Place) -> dict[str, Any]:
        record = reader.read(at)
        name = f"{place.source}/{record.key}"
        sample_key = stable_hash(name)
        image = decode_image(record.image)
        caption = record.captions[0]
        if self.augment:
            rng = keyed_generator(self.seed, 3, place.epoch, sample_key)
            caption = record.captions[int(rng.integers(len(record.captions)))]
            pixels = train_image(
                image, self.image_size, rng, scale=self.config.crop_scale, flip=self.config.flip
            )
        else:
            pixels = eval_image(image, self.image_size)
        return {
            "pixels": pixels,
            "ids": self.tokenizer(caption),
            "sample_key": sample_key,
            "key": name,
        }

    def collate(self, examples: list[dict[str, Any]]) -> Batch:
        ids = np.stack([example["ids"] for example in examples])
        pixels = np.stack([example["pixels"] for example in examples])
        return Batch(
            images=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(self.tokenizer.attention_mask(ids)),
            sample_key=torch.tensor([e["sample_key"] for e in examples], dtype=torch.int64),
            keys=tuple(e["key"] for e in examples),
            skipped=tuple(s for e in examples for s in e["skipped"]),
        )


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, BadSample) else f"cannot be decoded: {error}"


class TrainLoader:
    """Endless micro-batches of this rank, from any position of the run."""

    def __init__(
        self,
        dataset: PairDataset,
        order: SampleOrder,
        run: Run,
        *,
        micro_batch_size: int,
        workers: int,
        max_bad_share: float,
    ) -> None:
        self.dataset, self.order = dataset, order
        self.samples_per_epoch = order.samples_per_epoch
        self._run, self._micro_batch_size, self._workers = run, micro_batch_size, workers
        self._max_bad_share = max_bad_share
        self._batches: Iterator[Batch] | None = None
        self.read, self.bad = 0, 0

    def seek(self, samples_seen: int) -> None:
        """Go on behind so many samples of the run; without it a run starts at 0."""
        batches = rank_batches(
            self.order,
            samples_seen,
            micro_batch_size=self._micro_batch_size,
            rank=self._run.rank,
            world_size=self._run.world_size,
        )
        self._batches = iter(_torch_loader(self.dataset, batches, self._workers, self._run))

    def __next__(self) -> Batch:
        if self._batches is None:
            self.seek(0)
        assert self._batches is not None
        batch = next(self._batches)
        self.read += len(batch) + len(batch.skipped)
        self.bad += len(batch.skipped)
        for skipped in batch.skipped:
            self._run.note_skipped(skipped.shard, skipped.key, skipped.reason)
        if self.read >= MIN_READ and self.bad > self._max_bad_share * self.read:
            last = f"; last: {batch.skipped[-1]}" if batch.skipped else ""
            raise UserError(
                f"{self.bad} of {self.read} samples read cannot be used, more than "
                f"data.max_bad_share={self._max_bad_share}; see {self._run.dir}/skipped.jsonl{last}"
            )
        return batch

    def state(self) -> dict[str, Any]:
        """What the data must still look like for a saved position to mean the same."""
        return {"samples": [source.samples for source in self.order.sources]}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises UserError when the training data are not those of the checkpoint."""
        if state != self.state():
            raise UserError(
                f"data.train holds {self.state()['samples']} samples, the checkpoint's run had "
                f"{state['samples']}: its position has no meaning there"
            )


class HeldOut:
    """One pass over the held-out pairs, shared among the ranks, equally many batches on each.

    Iterates over Batch; row i of rank r is pair i * world_size + r, and repeats of the last pair fill
    up the end. len() is the number of pairs.
    """

    def __init__(
        self, dataset: PairDataset, run: Run, *, size: int, batch_size: int, workers: int
    ) -> None:
        self.dataset, self.size, self._run = dataset, size, run
        self._batch_size, self._workers = batch_size, workers

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Batch]:
        counts = [source.size.samples for source in self.dataset.sources]
        starts = np.concatenate([[0], np.cumsum(counts)])
        world, rank = self._run.world_size, self._run.rank
        rows = -(-self.size // world)
        mine = [min(i * world + rank, self.size - 1) for i in range(rows)]
        places = []
        for i in mine:
            source = int(np.searchsorted(starts, i, side="right")) - 1
            places.append(Place(source, i - int(starts[source]), 0))
        batches = (places[i : i + self._batch_size] for i in range(0, rows, self._batch_size))
        return iter(_torch_loader(self.dataset, batches, self._workers, self._run))


def _torch_loader(
    dataset: PairDataset, batches: Iterator[list[Place]], workers: int, run: Run
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of index lists will do
        num_workers=workers,
        collate_fn=dataset.collate,
        worker_init_fn=_start_worker,
        prefetch_factor=4 if workers else None,
        pin_memory=run.device.type == "cuda",
    )


def _start_worker(_: int) -> None:
    # Signals are for the ranks, which stop in an orderly way; a worker ends with its rank.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN if number != signal.SIGTERM else signal.SIG_DFL)
    torch.set_num_threads(1)


def build_loaders(
    config: DataConfig,
    sources: dict[str, list[Source]],
    vocabulary: Vocabulary,
    run: Run,
    *,
    image_size: int,
    micro_batch_size: int,
    eval_batch_size: int,
    max_eval: int | None,
) -> tuple[TrainLoader, HeldOut]:
    """The training stream and the held-out pairs of a run."""
    tokenizer = CaptionTokenizer(vocabulary, config.text_length)
    seed = run.seed
    train = PairDataset(
        sources["train"], tokenizer, config, image_size=image_size, seed=seed, augment=True
    )
    val = PairDataset(
        sources["val"], tokenizer, config, image_size=image_size, seed=seed, augment=False
    )
    order = SampleOrder([s.size for s in sources["train"]], seed, config.shuffle_shards)
    loader = TrainLoader(
        train,
        order,
        run,
        micro_batch_size=micro_batch_size,
        workers=config.workers,
        max_bad_share=config.max_bad_share,
    )
    size = sum(source.size.samples for source in sources["val"])
    held_out = HeldOut(
        val,
        run,
        size=min(size, max_eval or size),
        batch_size=eval_batch_size,
        workers=config.workers,
    )
    return loader, held_out
