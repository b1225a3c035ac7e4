"""The order of samples over a whole run, computed from counts alone.

The run is one endless sequence of samples, epoch after epoch; global batch i is its elements
[i * G, (i + 1) * G). Which rank, worker or micro-batch reads an element changes nothing, so the
position in the data is one number, the samples seen, at any world size and batch size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from elip_ds.data.augment import keyed_generator


@dataclass(frozen=True)
class SourceSize:
    """shards: samples in each shard.  weight: visits of each sample per epoch."""

    shards: tuple[int, ...]
    weight: float = 1.0

    @property
    def samples(self) -> int:
        return sum(self.shards)

    @property
    def per_epoch(self) -> int:
        return max(1, round(self.samples * self.weight))


@dataclass(frozen=True)
class Place:
    """Where a sample lies: which source, which sample of it; and the epoch, which keys its crop."""

    source: int
    sample: int
    epoch: int


class SampleOrder:
    def __init__(self, sources: Sequence[SourceSize], seed: int, window: int) -> None:
        """window: shards shuffled among each other, few, so that reading stays local on disk."""
        self.sources, self.seed, self.window = list(sources), seed, window
        self.samples_per_epoch = sum(source.per_epoch for source in sources)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def place(self, position: int) -> Place:
        """The sample at a position of the run, counted from 0."""
        epoch, at = divmod(position, self.samples_per_epoch)
        if epoch not in self._epochs:
            self._epochs = {epoch: self._order(epoch)}
        source, sample = self._epochs[epoch]
        return Place(int(source[at]), int(sample[at]), epoch)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        counts = [source.per_epoch for source in self.sources]
        labels = np.repeat(np.arange(len(counts)), counts)
        keyed_generator(self.seed, 1, epoch).shuffle(labels)
        samples = np.empty(len(labels), dtype=np.int64)
        for i, count in enumerate(counts):
            samples[labels == i] = self._stretch(i, epoch * count, count)
        return labels, samples

    def _stretch(self, source: int, start: int, count: int) -> np.ndarray:
        """count samples of one source's own endless sequence of shuffled passes, from start on."""
        size = self.sources[source].samples
        passes = range(start // size, (start + count - 1) // size + 1)
        order = np.concatenate([self._pass(source, p) for p in passes])
        first = start - passes[0] * size
        return order[first : first + count]

    def _pass(self, source: int, number: int) -> np.ndarray:
        """Every sample of a source once: shards shuffled, then samples within windows of shards."""
        rng = keyed_generator(self.seed, 2, source, number)
        shards = self.sources[source].shards
        starts = np.concatenate([[0], np.cumsum(shards)])
        deal = rng.permutation(len(shards))
        parts = []
        for at in range(0, len(deal), self.window):
            chosen = deal[at : at + self.window]
            inside = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in chosen])
            parts.append(rng.permutation(inside))
        return np.concatenate(parts)


def rank_batches(
    order: SampleOrder, start: int, *, micro_batches: Sequence[int], rank: int
) -> Iterator[list[Place]]:
    """This rank's micro-batches from position start on, without end.

    micro_batches: the ranks' sizes. They lie side by side: rank r takes the r-th of each round.
    """
    at = start + sum(micro_batches[:rank])
    while True:
        yield [order.place(at + i) for i in range(micro_batches[rank])]
        at += sum(micro_batches)
