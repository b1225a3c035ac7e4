"""What img2dataset downloads of CC3M, SBU and the like: a folder of tars, or of folders of files.

Source: rom1504/img2dataset, `output_format` webdataset and files. A sample is KEY.jpg, KEY.txt (the
caption) and KEY.json (its url and more); what could not be downloaded is absent. The parquet files
beside them are not read.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elip_ds.data.raw import Item, find_folder, read_bytes
from elip_ds.data.record import BadSample, Record
from elip_ds.data.shards import IMAGE_EXTENSIONS
from elip_ds.data.sources.tars import Shards, list_shards
from elip_ds.errors import UserError

KEPT = ("url", "sha256", "md5", "original_width", "original_height")
"What of img2dataset's json goes along; the rest is about the download."


class Img2Dataset(Shards):
    """img2dataset's output of CC3M, SBU and the like."""

    @dataclass(frozen=True)
    class Config:
        folder: str
        "img2dataset's output_folder."

    def items(self) -> Iterator[Item]:
        folder = find_folder(self.config.folder, "img2dataset.folder")
        tars = sorted(folder.glob("*.tar"))
        if tars:
            yield from list_shards(tars)
            return
        images = sorted(
            path
            for extension in IMAGE_EXTENSIONS
            for path in [*folder.glob(f"*.{extension}"), *folder.glob(f"*/*.{extension}")]
        )
        if not images:
            raise UserError(
                f"img2dataset.folder: {folder} holds neither *.tar nor */*.jpg, as img2dataset "
                "writes with output_format webdataset and files"
            )
        for path in images:
            yield Item(path.stem, str(path))

    def read(self, item: Item) -> Record:
        if item.where.endswith(".tar"):
            record = super().read(item)
            return dataclasses.replace(record, meta=_kept(record.meta))
        path = Path(item.where)
        image = read_bytes(item.where)
        try:
            caption = path.with_suffix(".txt").read_text(encoding="utf-8", errors="replace")
        except OSError:
            raise BadSample("no caption") from None
        return Record(item.key, image, path.suffix[1:], (caption,), _kept(_meta(path)))


def _meta(image: Path) -> dict[str, Any]:
    try:
        meta = json.loads(image.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _kept(meta: dict[str, Any]) -> dict[str, Any]:
    return {name: meta[name] for name in KEPT if meta.get(name) is not None}
