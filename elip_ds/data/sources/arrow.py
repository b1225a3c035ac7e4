"""METER's and ViLT's Arrow tables: columns image (bytes), caption (list), image_id, split.

Source: `write_coco_karpathy.py` and its neighbours in dandelin/ViLT, which METER took over. They
are Arrow IPC files; image_id and split may be absent. pyarrow maps them, so that listing reads the
ids and no image.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elip_ds.data.raw import Item, RawSource, as_captions, find_files
from elip_ds.data.record import BadSample, Record
from elip_ds.errors import UserError


class ArrowTable(RawSource):
    """METER's Arrow tables; needs pyarrow."""

    @dataclass(frozen=True)
    class Config:
        files: list[str]
        "The .arrow files, paths or globs."
        splits: list[str] = field(default_factory=list)
        "Which values of the column split; none given is all."

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._name, self._table = "", None

    def items(self) -> Iterator[Item]:
        found: set[str] = set()
        for path in find_files(self.config.files, "arrow.files"):
            table = open_table(path)
            ids = _column(table, "image_id")
            splits = _column(table, "split")
            for i in range(table.num_rows):
                split = None if splits is None else str(splits[i])
                found.add(str(split))
                if self.config.splits and split not in self.config.splits:
                    continue
                key = f"{path.stem}_{i:07d}" if ids is None else Path(str(ids[i])).stem
                meta = {} if split is None else {"split": split}
                yield Item(key, str(path), (), meta, at=i)
        missing = set(self.config.splits) - found
        if missing:
            raise UserError(
                f"arrow.splits: no row is of split {', '.join(sorted(missing))}; there are "
                f"{', '.join(sorted(found))}"
            )

    def read(self, item: Item) -> Record:
        if self._name != item.where:
            self._name, self._table = item.where, open_table(Path(item.where))
        table: Any = self._table
        if item.at is None or item.at >= table.num_rows:
            raise BadSample("its table has changed")
        image, caption = (table.column(name)[item.at].as_py() for name in ("image", "caption"))
        if not isinstance(image, bytes):
            raise BadSample("no image")
        return Record(item.key, image, "", as_captions(caption), item.meta)


def open_table(path: Path) -> Any:
    """A pyarrow.Table on the mapped file. Raises UserError if it is none, or pyarrow is absent."""
    try:
        import pyarrow
    except ImportError:
        raise UserError("the kind arrow needs pyarrow: pip install 'elip_ds[arrow]'") from None
    try:
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"arrow.files: {path} is no Arrow file: {error}") from None
    for name in ("image", "caption"):
        if name not in table.column_names:
            known = ", ".join(table.column_names)
            raise UserError(f"arrow.files: {path} has no column {name!r}; it has {known}")
    return table


def _column(table: Any, name: str) -> list[Any] | None:
    return table.column(name).to_pylist() if name in table.column_names else None
