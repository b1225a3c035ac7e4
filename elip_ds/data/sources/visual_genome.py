"""Visual Genome's region descriptions: a whole image with the phrases of its regions as captions.

Source: `region_descriptions.json`, [{"id", "regions": [{"phrase", ...}]}], and `image_data.json`,
[{"image_id", "url", ...}], of visualgenome.org. ALBEF, METER and their followers pair the whole
image with a phrase, and no region is cut out; so does this. An image has about fifty phrases, of
which an epoch shows one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elip_ds.data.raw import (
    Item,
    RawSource,
    as_captions,
    as_list,
    field_of,
    find_files,
    find_folder,
    read_json,
)

FOLDERS = ("VG_100K", "VG_100K_2", "")


class VisualGenome(RawSource):
    """Visual Genome's region_descriptions.json."""

    @dataclass(frozen=True)
    class Config:
        file: str
        "region_descriptions.json."
        images: str
        "Folder of the images, as they are unpacked: in VG_100K and VG_100K_2, or all in one."
        image_data: str = ""
        "image_data.json, for the number of an image in COCO and Flickr."

    def items(self) -> Iterator[Item]:
        (path,) = find_files([self.config.file], "visual_genome.file")
        folder = find_folder(self.config.images, "visual_genome.images")
        there = _listed(folder)
        facts = self._facts()
        for i, entry in enumerate(as_list(read_json(path), str(path))):
            where = f"{path}: entry {i}"
            number = field_of(entry, "id", where, int)
            regions = field_of(entry, "regions", where, list)
            phrases = [field_of(region, "phrase", f"{where}: a region") for region in regions]
            image = there.get(f"{number}.jpg", folder / f"{number}.jpg")
            yield Item(str(number), str(image), as_captions(phrases), facts.get(number, {}))

    def _facts(self) -> dict[int, dict]:
        """Image number -> what is known of it beside the regions."""
        if not self.config.image_data:
            return {}
        (path,) = find_files([self.config.image_data], "visual_genome.image_data")
        return {
            field_of(entry, "image_id", f"{path}: entry {i}", int): {
                key: entry[key] for key in ("coco_id", "flickr_id", "url") if entry.get(key)
            }
            for i, entry in enumerate(as_list(read_json(path), str(path)))
        }


def _listed(folder: Path) -> dict[str, Path]:
    """File name -> path, of the folders that there are."""
    found: dict[str, Path] = {}
    for name in FOLDERS:
        part = folder / name
        for path in part.glob("*.jpg") if part.is_dir() else ():
            found.setdefault(path.name, path)
    return found
