"""ALBEF's json lists: [{"image": path, "caption": text or list of texts}, ...], several files.

Source: the `pretrain` and `*_train.json` files of ALBEF and BLIP. A list for fine-tuning has one
entry for each caption of an image; entries of one image become one sample with all its captions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elip_ds.data.raw import (
    Item,
    RawSource,
    as_captions,
    as_list,
    field_of,
    find_files,
    grouped,
    key_of,
    read_json,
)


class JsonList(RawSource):
    """ALBEF-style json lists of image and caption."""

    @dataclass(frozen=True)
    class Config:
        files: list[str]
        "The json files, paths or globs."
        images: str = ""
        "Folder that relative image paths start from."
        strip: str = ""
        "Beginning of image paths to take away first, such as the folder on the authors' machine."

    def items(self) -> Iterator[Item]:
        yield from grouped(self._entries())

    def _entries(self) -> Iterator[Item]:
        config = self.config
        for path in find_files(config.files, "albef_json.files"):
            for i, entry in enumerate(as_list(read_json(path), str(path))):
                where = f"{path}: entry {i}"
                image = field_of(entry, "image", where, str).removeprefix(config.strip)
                if config.strip:
                    image = image.lstrip("/")
                captions = as_captions(field_of(entry, "caption", where))
                yield Item(key_of(image), str(Path(config.images) / image), captions, _rest(entry))


def _rest(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in ("image", "caption")}
