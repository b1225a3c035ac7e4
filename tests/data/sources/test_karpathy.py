"""Karpathy's splits of COCO and Flickr30K."""

from pathlib import Path
from typing import Any

import pytest
from data.raw_files import jpeg, pairs, read_source, write_images, write_json

from elip_ds.errors import UserError


def image(name: str, split: str, *captions: str, **more: Any) -> dict[str, Any]:
    sentences = [{"raw": caption, "tokens": caption.split()} for caption in captions]
    return {"filename": name, "split": split, "sentences": sentences, "imgid": 7} | more


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    write_images(tmp_path, "train2014/a.jpg", "val2014/b.jpg", "val2014/c.jpg", "val2014/d.jpg")
    entries = [
        image("a.jpg", "train", "an a", "one a", filepath="train2014", cocoid=11),
        image("b.jpg", "restval", "a b", filepath="val2014", cocoid=12),
        image("c.jpg", "val", "a c", filepath="val2014", cocoid=13),
        image("d.jpg", "test", "a d", filepath="val2014", cocoid=14),
    ]
    return write_json(tmp_path / "dataset_coco.json", {"dataset": "coco", "images": entries})


def test_training_takes_what_was_left_of_the_validation_set(coco: Path) -> None:
    records = read_source("karpathy", f"file={coco}", f"images={coco.parent}")
    assert pairs(records) == [("a", ("an a", "one a")), ("b", ("a b",))]
    assert [record.image for record in records] == [jpeg(0), jpeg(1)]
    assert records[1].meta == {"cocoid": 12, "imgid": 7, "split": "restval"}


def test_a_split_is_chosen(coco: Path) -> None:
    words = (f"file={coco}", f"images={coco.parent}")
    assert pairs(read_source("karpathy", *words, "splits=test")) == [("d", ("a d",))]
    assert len(read_source("karpathy", *words, "splits=[train,val]")) == 2


def test_flickr_has_neither_folders_nor_a_rest(tmp_path: Path) -> None:
    write_images(tmp_path, "36979.jpg")
    path = write_json(tmp_path / "x.json", {"images": [image("36979.jpg", "train", "two men")]})
    words = (f"file={path}", f"images={tmp_path}")
    assert pairs(read_source("karpathy", *words)) == [("36979", ("two men",))]
    with pytest.raises(
        UserError, match=r"karpathy.splits: .*x.json has no split dev; it has train"
    ):
        read_source("karpathy", *words, "splits=dev")


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ([], "x.json is a list; an object with 'images' is wanted"),
        ({"images": [{"filename": "a"}]}, "x.json: image 0 has no 'split'; it has filename"),
        (
            {"images": [image("a", "train") | {"sentences": [{"caption": "x"}]}]},
            "x.json: image 0: a sentence has no 'raw'; it has caption",
        ),
    ],
)
def test_a_json_of_another_shape_says_where(tmp_path: Path, value: object, line: str) -> None:
    path = write_json(tmp_path / "x.json", value)
    with pytest.raises(UserError, match=line):
        read_source("karpathy", f"file={path}", f"images={tmp_path}")
