"""Places in the shards -> a batch of image-caption pairs; what a loader's worker process does.

A sample that cannot be used is replaced by the next one of its source, and named in the batch.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from elip_ds.config.schema import DataConfig
from elip_ds.data.augment import eval_image, keyed_generator, train_image
from elip_ds.data.batch import Batch, Skipped, shortest_length, stable_hash
from elip_ds.data.corpus import Source, build_fetcher
from elip_ds.data.decode import EncodedImage
from elip_ds.data.headers import scan_once
from elip_ds.data.order import Place
from elip_ds.data.record import PASSING, BadSample, BadShard, Record
from elip_ds.data.shards import INDEX, Shard, ShardReader
from elip_ds.data.text import CaptionTokenizer
from elip_ds.errors import PassingError, UserError

OPEN_SHARDS = 32
"Shards that one worker keeps open, or as many as are shuffled among each other if that is more."
AGAIN_SECONDS = 300.0
"Until a shard that could not be read is tried again."
BAD_IN_A_ROW = 100
"Neighbours that are tried before a source counts as useless."


class Failed(NamedTuple):
    """In place of a shard's reader. kind, reason: as of a BadShard.  until: monotonic seconds."""

    reason: str
    kind: str
    until: float


class Pair(NamedTuple):
    """pixels: (H, W, 3) uint8.  ids: (L,) int64."""

    pixels: np.ndarray
    ids: np.ndarray
    sample_key: int
    key: str


class PairDataset(Dataset):
    """Lists of places -> batches. augment: crop, mirror and caption drawn at random.

    image_size: height, width.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: CaptionTokenizer,
        config: DataConfig,
        *,
        image_size: tuple[int, int],
        seed: int,
        augment: bool,
    ) -> None:
        self.sources, self.tokenizer, self.config = list(sources), tokenizer, config
        self.image_size, self.seed, self.augment = image_size, seed, augment
        self._starts = [np.cumsum([0, *source.counts]) for source in self.sources]
        self._open_shards = max(OPEN_SHARDS, (config.shuffle_shards + 1) * len(self.sources))
        self._readers: dict[Shard, ShardReader | Failed] = {}
        self._fetcher = build_fetcher(config)
        self._patience = self._fetcher.patience
        self._scan = partial(scan_once, folder=self._fetcher.folder / "headers")

    def __getitem__(self, places: Sequence[Place]) -> Batch | UserError:
        """A UserError is returned: raised in a worker process it would arrive as a traceback."""
        skipped: list[Skipped] = []
        try:
            return self._batch([self._usable_pair(place, skipped) for place in places], skipped)
        except UserError as error:
            return error

    def _batch(self, pairs: list[Pair], skipped: list[Skipped]) -> Batch:
        ids = np.stack([pair.ids for pair in pairs])
        images = np.empty((len(pairs), 3, *self.image_size), dtype=np.uint8)
        for i, pair in enumerate(pairs):
            images[i] = pair.pixels.transpose(2, 0, 1)
        batch = Batch(
            images=torch.from_numpy(images),
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(self.tokenizer.attention_mask(ids)),
            sample_key=torch.tensor([pair.sample_key for pair in pairs], dtype=torch.int64),
            keys=tuple(pair.key for pair in pairs),
            skipped=tuple(skipped),
        )
        # Held-out texts of several batches and ranks are joined and stay of one length.
        if self.config.pad == "longest" and self.augment:
            return batch.shortened(shortest_length(batch.attention_mask))
        return batch

    def _usable_pair(self, place: Place, skipped: list[Skipped]) -> Pair:
        """The pair at a place or the next usable one; what lies between is added to skipped."""
        source, sample = self.sources[place.source], place.sample
        tries = min(source.size.samples, BAD_IN_A_ROW)
        for _ in range(tries):
            shard, at = self._locate(place.source, sample)
            name, reader = str(source.shards[shard]), None
            try:
                reader = self._reader(source, shard)
                return self._pair(self._patience(reader.read, at), place)
            except TimeoutError as error:
                self._give_up(source.shards[shard], str(error))
                bad: BadSample = BadSample(str(error), "slow")
            except BadSample as error:
                bad = error
            key = "" if reader is None else reader.key(at)
            skipped.append(Skipped(source.name, name, key, bad.kind, str(bad)))
            # Of a shard that is lost from here on, or whole, the neighbour stands in, sample for
            # sample: the next ones here would all be lost, too.
            if reader is None or at >= len(reader):
                shard = (shard + 1) % len(source.shards)
                sample = int(self._starts[place.source][shard]) + at % source.counts[shard]
            else:
                sample = (sample + 1) % source.size.samples
        last = skipped[-tries]
        passing = all(one.kind in PASSING for one in skipped[-tries:])
        raise (PassingError if passing else UserError)(
            f"data: {tries} samples in a row of {source.name} cannot be used, "
            f"from {last.key or 'one'} of {last.shard} on ({last.reason})"
        )

    def _locate(self, source: int, sample: int) -> tuple[int, int]:
        """Number of the shard, and of the sample in it."""
        starts = self._starts[source]
        shard = int(np.searchsorted(starts, sample, side="right")) - 1
        return shard, sample - int(starts[shard])

    def _reader(self, source: Source, number: int) -> ShardReader:
        """Raises BadShard, also for a while after a failure."""
        shard, count = source.shards[number], source.counts[number]
        reader = self._readers.pop(shard, None)
        if reader is None or (isinstance(reader, Failed) and time.monotonic() > reader.until):
            reader = self._open(shard)
        self._readers[shard] = reader  # most recently used last
        if len(self._readers) > self._open_shards:
            oldest = self._readers.pop(next(iter(self._readers)))
            if isinstance(oldest, ShardReader):
                oldest.close()
        if isinstance(reader, Failed):
            raise BadShard(reader.reason, reader.kind)
        if len(reader) > count or (len(reader) < count and reader.whole):
            raise UserError(
                f"data: shard {shard} holds {len(reader)} samples, counted were {count}; it was "
                f"changed, or the {INDEX} beside it is of another one: delete that"
            )
        return reader

    def _open(self, shard: Shard) -> ShardReader | Failed:
        try:
            return self._fetcher.use(shard, partial(ShardReader, scan=self._scan))
        except BadShard as error:
            return _failed(str(error), error.kind)
        except TimeoutError as error:
            return _failed(str(error), "slow")

    def _give_up(self, shard: Shard, reason: str) -> None:
        """Its reader is left to the thread that still waits for it."""
        self._readers[shard] = _failed(reason, "slow")

    def _pair(self, record: Record, place: Place) -> Pair:
        key = f"{place.source}/{record.key}"
        sample_key = stable_hash(key)
        image = EncodedImage(
            record.image, max_pixels=self.config.max_pixels, min_side=self.config.min_side
        )
        caption = record.captions[0]
        if self.augment:
            rng = keyed_generator(self.seed, 3, place.epoch, sample_key)
            if self.sources[place.source].caption == "random":
                caption = record.captions[int(rng.integers(len(record.captions)))]
            pixels = train_image(image, self.image_size, rng, self.config)
        else:
            whole = Image.fromarray(image.pixels())
            pixels = eval_image(whole, self.image_size, self.config.resize)
        return Pair(pixels, self.tokenizer(caption), sample_key, key)


def _failed(reason: str, kind: str) -> Failed:
    return Failed(reason, kind, time.monotonic() + AGAIN_SECONDS)
