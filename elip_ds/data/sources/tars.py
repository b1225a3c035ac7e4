"""Samples that are in tar shards already: ours and anyone's in the WebDataset layout."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elip_ds.data.raw import Item, RawSource
from elip_ds.data.record import BadSample, BadShard, Record
from elip_ds.data.shards import ShardReader, expand_files


class Shards(RawSource):
    """Existing shards, to cut, resize or merge them anew."""

    @dataclass(frozen=True)
    class Config:
        shards: str
        "Path, glob or brace pattern; several with :: between them."

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._open: ShardReader | None = None

    def items(self) -> Iterator[Item]:
        yield from list_shards(expand_files(self.config.shards, "shards.shards"))

    def read(self, item: Item) -> Record:
        if self._open is None or str(self._open.path) != item.where:
            if self._open is not None:
                self._open.close()
            try:
                self._open = ShardReader(Path(item.where))
            except BadShard:
                self._open = None
                raise
        if item.at is None:
            raise BadSample("its shard ends too early; what is lost is not counted", "truncated")
        return self._open.read(item.at)


def list_shards(paths: list[Path]) -> Iterator[Item]:
    """The samples of tar files, by their headers; a damaged file is one item, whose read fails."""
    for path in paths:
        try:
            reader = ShardReader(path)
        except BadShard:
            yield Item(path.stem, str(path))
            continue
        for i in range(len(reader)):
            yield Item(reader.key(i), str(path), at=i)
        if not reader.whole:
            yield Item(path.stem, str(path))
        reader.close()
