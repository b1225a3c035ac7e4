"""ALBEF's json lists."""

from pathlib import Path

import pytest
from data.raw_files import jpeg, pairs, read_source, write_images, write_json

from elip_ds.errors import UserError


def test_texts_and_lists_of_several_files_are_read(tmp_path: Path) -> None:
    write_images(tmp_path, "im/a.jpg", "im/b.jpg", "im/c.jpg")
    write_json(tmp_path / "1.json", [{"image": "im/a.jpg", "caption": "one"}])
    second = [
        {"image": "im/b.jpg", "caption": ["two", "deux"], "image_id": "x_2"},
        {"image": "im/c.jpg", "caption": "three"},
    ]
    write_json(tmp_path / "2.json", second)
    records = read_source("albef_json", f"files={tmp_path}/*.json", f"images={tmp_path}")
    assert pairs(records) == [
        ("im_a", ("one",)), ("im_b", ("two", "deux")), ("im_c", ("three",))
    ]  # fmt: skip
    assert [record.image for record in records] == [jpeg(i) for i in range(3)]
    assert records[1].meta == {"image_id": "x_2"}


def test_entries_of_one_image_become_one_sample(tmp_path: Path) -> None:
    write_images(tmp_path, "a.jpg", "b.jpg")
    entries = [{"image": f"{x}.jpg", "caption": f"{x}{i}"} for i in range(2) for x in "ab"]
    path = write_json(tmp_path / "x.json", entries)
    records = read_source("albef_json", f"files={path}", f"images={tmp_path}")
    assert pairs(records) == [("a", ("a0", "a1")), ("b", ("b0", "b1"))]


def test_the_authors_own_folder_is_taken_away(tmp_path: Path) -> None:
    write_images(tmp_path, "coco/a.jpg")
    path = write_json(tmp_path / "x.json", [{"image": "/export/share/coco/a.jpg", "caption": "x"}])
    words = (f"files={path}", f"images={tmp_path}", "strip=/export/share")
    assert pairs(read_source("albef_json", *words)) == [("coco_a", ("x",))]


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({"annotations": []}, r"x.json is an object, it has annotations; a list is wanted"),
        ([{"image": "a", "text": "b"}], r"x.json: entry 0 has no 'caption'; it has image, text"),
        ([{"image": 3, "caption": "b"}], r"x.json: entry 0: 'image' is a whole number; wanted is"),
        (["a.jpg"], r"x.json: entry 0 is a text; an object with 'image' is wanted"),
    ],
)
def test_a_json_of_another_shape_says_where(tmp_path: Path, value: object, line: str) -> None:
    path = write_json(tmp_path / "x.json", value)
    with pytest.raises(UserError, match=line):
        read_source("albef_json", f"files={path}")
