"""The built-in scenes as a source to make shards of; synthetic.py draws them."""

from collections.abc import Iterator
from dataclasses import dataclass

from elip_ds.data.raw import Item, RawSource
from elip_ds.data.record import Record
from elip_ds.data.sources.synthetic import check_scenes, scenes
from elip_ds.errors import UserError


class Scenes(RawSource):
    """The built-in scenes, drawn, not read."""

    @dataclass(frozen=True)
    class Config:
        split: str = "train"
        "train or val."
        count: int = 12000
        "Number of scenes."
        image_size: int = 64
        "Side of a picture in pixels."
        seed: int = 0
        "Another seed is other scenes of the same split."

        def __post_init__(self) -> None:
            if self.count < 1:
                raise UserError(f"scenes.count={self.count}: 1 or more")
            try:
                check_scenes(self.split, self.image_size)
            except ValueError as error:
                raise UserError(f"scenes: {error}") from None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._next = -1
        self._drawn: Iterator[Record] = iter(())

    def items(self) -> Iterator[Item]:
        for i in range(self.config.count):
            yield Item(f"{self.config.split}-{i:06d}", "drawn", at=i)

    def read(self, item: Item) -> Record:
        """Cheap in order; a leap in val draws what lies before again, to repeat none of it."""
        assert item.at is not None
        config = self.config
        if item.at != self._next:
            self._drawn = scenes(
                config.split,
                config.count,
                seed=config.seed,
                image_size=config.image_size,
                start=item.at,
            )
        self._next = item.at + 1
        return next(self._drawn)
