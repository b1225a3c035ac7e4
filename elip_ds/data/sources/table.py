"""A csv, tsv or jsonl that names image files and their captions.

Rows of one image become one sample with all its captions. A tsv is read as CC3M's are: no quoting.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elip_ds.data.raw import Item, RawSource, as_captions, field_of, find_files, grouped, key_of
from elip_ds.errors import UserError

LONGEST_FIELD = 2**24  # characters; Python's own limit is below some alt-texts


class Table(RawSource):
    """A csv, tsv or jsonl of image files and captions."""

    @dataclass(frozen=True)
    class Config:
        files: list[str]
        "The tables, paths or globs; they end in .csv, .tsv, .txt (as tsv) or .jsonl."
        images: str = ""
        "Folder that relative image paths start from; '' is that of the table."
        image: str = "image"
        "Name of the column with the path."
        caption: str = "caption"
        "Name of the column with the caption; in a jsonl it may be a list."
        columns: list[str] = field(default_factory=list)
        "Names of the columns of a csv or tsv without a first line that names them."

    def items(self) -> Iterator[Item]:
        yield from grouped(self._rows())

    def _rows(self) -> Iterator[Item]:
        config = self.config
        for path in find_files(config.files, "table.files"):
            folder = Path(config.images).expanduser() if config.images else path.parent
            for line, row in self._read(path):
                where = f"{path}: line {line}"
                image = field_of(row, config.image, where, str)
                captions = as_captions(field_of(row, config.caption, where))
                known = (config.image, config.caption)
                meta = {name: value for name, value in row.items() if name not in known}
                yield Item(key_of(image), str(folder / image), captions, meta)

    def _read(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number of the line, from 1, and its fields."""
        try:
            opened = path.open(encoding="utf-8-sig", errors="replace", newline="")
        except OSError as error:
            raise UserError(f"table.files: {path} cannot be read: {error.strerror}") from None
        with opened as file:
            if path.suffix == ".jsonl":
                yield from _json_lines(file, path)
                return
            if path.suffix not in (".csv", ".tsv", ".txt"):
                raise UserError(f"table.files: {path} ends in none of .csv, .tsv, .txt, .jsonl")
            csv.field_size_limit(LONGEST_FIELD)
            form: dict[str, Any] = {"strict": True}
            if path.suffix != ".csv":
                form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
            rows = csv.DictReader(file, fieldnames=self.config.columns or None, **form)
            try:
                for row in rows:
                    row.pop(None, None)  # more fields than names # type: ignore[call-overload]
                    yield rows.line_num, {k: "" if v is None else v for k, v in row.items()}
            except csv.Error as error:
                raise UserError(f"{path}: behind line {rows.line_num}: {error}") from None


def _json_lines(file: Any, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}: line {number} is no JSON: {error}") from None
