"""Karpathy's splits of COCO and Flickr30K: {"images": [{"filename", "split", "sentences"}, ...]}.

Source: `dataset_coco.json` and `dataset_flickr30k.json` of Karpathy and Fei-Fei, arXiv:1412.2306.
COCO's `filepath` is the folder of an image; "restval" are the images of COCO's validation set that
everybody trains on.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from elip_ds.data.raw import (
    Item,
    RawSource,
    as_captions,
    field_of,
    find_files,
    find_folder,
    read_json,
)
from elip_ds.errors import UserError


class Karpathy(RawSource):
    """Karpathy's json of COCO or Flickr30K."""

    @dataclass(frozen=True)
    class Config:
        file: str
        "dataset_coco.json or dataset_flickr30k.json."
        images: str
        "Folder of the images; COCO's holds train2014 and val2014."
        splits: list[str] = field(default_factory=lambda: ["train", "restval"])
        "Which of train, restval, val and test."

    def items(self) -> Iterator[Item]:
        (path,) = find_files([self.config.file], "karpathy.file")
        folder = find_folder(self.config.images, "karpathy.images")
        entries = field_of(read_json(path), "images", str(path), list)
        found = {field_of(entry, "split", _at(path, i), str) for i, entry in enumerate(entries)}
        # Flickr30K has no restval, which the default names.
        missing = set(self.config.splits) - found - {"restval"}
        if missing:
            raise UserError(
                f"karpathy.splits: {path} has no split {', '.join(sorted(missing))}; "
                f"it has {', '.join(sorted(found))}"
            )
        for i, entry in enumerate(entries):
            if entry["split"] in self.config.splits:
                yield self._item(entry, folder, _at(path, i))

    def _item(self, entry: dict, folder: Path, where: str) -> Item:
        name = field_of(entry, "filename", where, str)
        sentences = field_of(entry, "sentences", where, list)
        captions = [field_of(sentence, "raw", f"{where}: a sentence") for sentence in sentences]
        image = folder / entry.get("filepath", "") / name
        ids = {key: entry[key] for key in ("cocoid", "imgid") if key in entry}
        return Item(
            Path(name).stem, str(image), as_captions(captions), ids | {"split": entry["split"]}
        )


def _at(path: Path, i: int) -> str:
    return f"{path}: image {i}"
