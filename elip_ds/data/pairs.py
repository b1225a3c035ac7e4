"""Places in the shards -> a batch of image-caption pairs; what a loader's worker process does.

A sample that cannot be used is replaced by the next one of its source, and named in the batch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from elip_ds.config.schema import DataConfig
from elip_ds.data.augment import eval_image, keyed_generator, train_image
from elip_ds.data.batch import Batch, Skipped, shortest_length, stable_hash
from elip_ds.data.corpus import Source
from elip_ds.data.decode import EncodedImage
from elip_ds.data.order import Place
from elip_ds.data.record import BadSample
from elip_ds.data.shards import INDEX, ShardReader
from elip_ds.data.text import CaptionTokenizer
from elip_ds.errors import UserError

OPEN_SHARDS = 32
"Shards that one worker keeps open, or as many as are shuffled among each other if that is more."
BAD_IN_A_ROW = 100
"Neighbours that are tried before a source counts as useless."


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
        self._readers: dict[Path, ShardReader] = {}

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
        size = self.sources[place.source].size.samples
        tries = min(size, BAD_IN_A_ROW)
        for ahead in range(tries):
            reader, at = self._locate(place.source, (place.sample + ahead) % size)
            try:
                return self._pair(reader, at, place)
            except BadSample as error:
                skipped.append(Skipped(str(reader.path), reader.key(at), str(error)))
        bad = skipped[-tries]
        raise UserError(
            f"data: {tries} samples in a row of {self.sources[place.source].name} cannot be used, "
            f"from {bad.key} of {bad.shard} on ({bad.reason})"
        )

    def _locate(self, source: int, sample: int) -> tuple[ShardReader, int]:
        starts = self._starts[source]
        shard = int(np.searchsorted(starts, sample, side="right")) - 1
        path, count = self.sources[source].shards[shard], self.sources[source].counts[shard]
        reader = self._reader(path)
        if len(reader) != count:
            raise UserError(
                f"data: shard {path} holds {len(reader)} samples, counted were {count}; it was "
                f"changed, or {path.parent / INDEX} is of another one: delete that"
            )
        return reader, sample - int(starts[shard])

    def _reader(self, path: Path) -> ShardReader:
        reader = self._readers.pop(path, None) or ShardReader(path)
        self._readers[path] = reader  # most recently used last
        if len(self._readers) > self._open_shards:
            self._readers.pop(next(iter(self._readers))).close()
        return reader

    def _pair(self, reader: ShardReader, at: int, place: Place) -> Pair:
        record = reader.read(at)
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
