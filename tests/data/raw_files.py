"""Raw data sets of a few pictures, and jobs on them, made by the tests of this folder."""

import io
import json
from pathlib import Path
from typing import Any

from data.made_shards import png
from PIL import Image

from elip_ds.data.making import Job
from elip_ds.data.raw import RawSource, open_raw
from elip_ds.data.record import Record
from elip_ds.data.shards import ShardReader


def jpeg(number: int, size: tuple[int, int] = (24, 16), **options: Any) -> bytes:
    """The picture of a number as a JPEG; options are Pillow's."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(number, size))).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def write_images(folder: Path, *names: str) -> list[Path]:
    """Pictures 0, 1, ... under these names."""
    paths = [folder / name for name in names]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    return paths


def read_source(kind: str, *words: str) -> list[Record]:
    """All samples of a raw source, as it gives them."""
    source = open_raw(kind, words)
    return [source.read(item) for item in source.items()]


def pairs(records: list[Record]) -> list[tuple[str, tuple[str, ...]]]:
    return [(record.key, record.captions) for record in records]


def write_table(folder: Path, count: int) -> Path:
    """A jsonl of so many pictures: 0.jpg with "picture 0", ..."""
    write_images(folder, *(f"{i}.jpg" for i in range(count)))
    rows = [{"image": f"{i}.jpg", "caption": f"picture {i}"} for i in range(count)]
    path = folder / "table.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table_job(table: Path, out: Path, **settings: Any) -> Job:
    source: RawSource = open_raw("table", [f"files={table}"])
    return Job(
        **{"kind": "table", "config": source.config, "folder": out, "prefix": "t"} | settings
    )


def records_in(folder: Path, prefix: str = "t") -> list[Record]:
    """Of all shards in order."""
    readers = map(ShardReader, sorted(folder.glob(f"{prefix}-*.tar")))
    return [reader.read(i) for reader in readers for i in range(len(reader))]


def bytes_in(folder: Path) -> dict[str, bytes]:
    """What a folder shows: shards, index, list of the skipped."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
