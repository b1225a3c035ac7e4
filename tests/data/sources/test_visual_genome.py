"""Visual Genome: an image with the phrases of its regions."""

from pathlib import Path

import pytest
from data.raw_files import jpeg, read_source, write_images, write_json

from elip_ds.errors import UserError


@pytest.fixture
def regions(tmp_path: Path) -> Path:
    write_images(tmp_path, "VG_100K/1.jpg", "VG_100K_2/2.jpg", "3.jpg")
    entries = [
        {
            "id": i,
            "regions": [
                {"region_id": 10 * i + j, "image_id": i, "phrase": f"thing {j} of {i}", "x": 0}
                for j in range(2)
            ],
        }
        for i in (2, 1, 3)
    ]
    return write_json(tmp_path / "region_descriptions.json", entries)


def test_an_image_has_its_regions_phrases_wherever_it_lies(regions: Path) -> None:
    records = read_source("visual_genome", f"file={regions}", f"images={regions.parent}")
    assert [record.key for record in records] == ["2", "1", "3"]
    assert [record.image for record in records] == [jpeg(1), jpeg(0), jpeg(2)]
    assert records[0].captions == ("thing 0 of 2", "thing 1 of 2")


def test_what_is_known_of_an_image_goes_along(regions: Path, tmp_path: Path) -> None:
    facts = [{"image_id": 1, "coco_id": 99, "flickr_id": None, "url": "u", "width": 24}]
    data = write_json(tmp_path / "image_data.json", facts)
    words = (f"file={regions}", f"images={tmp_path}", f"image_data={data}")
    assert [record.meta for record in read_source("visual_genome", *words)] == [
        {}, {"coco_id": 99, "url": "u"}, {}
    ]  # fmt: skip


def test_a_json_of_another_shape_says_where(tmp_path: Path) -> None:
    path = write_json(tmp_path / "x.json", [{"id": 1, "regions": [{"caption": "x"}]}])
    with pytest.raises(UserError, match=r"x.json: entry 0: a region has no 'phrase'; it has cap"):
        read_source("visual_genome", f"file={path}", f"images={tmp_path}")
