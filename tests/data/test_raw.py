"""What all raw sources share: their settings, and what is said of files of another form."""

from pathlib import Path

import pytest

from elip_ds import registry
from elip_ds.data.raw import Item, RawSource, field_of, grouped, key_of, open_raw, settings
from elip_ds.errors import UserError


@pytest.mark.parametrize("kind", registry.SOURCES)
def test_every_kind_shows_its_settings(kind: str) -> None:
    source = registry.resolve(registry.SOURCES, kind, "kind")
    assert issubclass(source, RawSource)
    assert all("=" in word for word in settings(source).split())


@pytest.mark.parametrize(
    ("kind", "words", "line"),
    [
        ("coco", [], r"kind='coco' is not known; .*known: albef_json, arrow, img2dataset, karpa"),
        ("karpathy", ["file"], "'file' is not key=value; karpathy knows file, images, splits"),
        ("karpathy", ["file=x"], "karpathy.images is missing; karpathy needs file, images, splits"),
        ("karpathy", ["flie=x"], "karpathy.flie is not a setting; did you mean karpathy.file?"),
        ("table", ["files=[a"], r"table.files=\[a: the brackets or quotes do not fit"),
        ("scenes", ["count=many"], "scenes.count=many: a whole number is wanted"),
        ("scenes", ["count=0"], "scenes.count=0: 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_one_line(kind: str, words: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        open_raw(kind, words)


def test_one_word_is_a_list_of_one() -> None:
    assert open_raw("table", ["files=a.csv"]).config.files == ["a.csv"]
    assert open_raw("table", ["files=[a.csv, 7.csv]"]).config.files == ["a.csv", "7.csv"]
    assert open_raw("karpathy", ["file=7", "images=[x]"]).config.images == "[x]"


@pytest.mark.parametrize(
    ("kind", "words", "line"),
    [
        ("albef_json", ["files={}/none.json"], "albef_json.files: .*/none.json does not exist"),
        ("table", ["files={}/*.csv"], "table.files: no file matches .*/\\*.csv"),
        ("table", ["files={}"], "table.files: .* is a folder; name a file"),
        ("img2dataset", ["folder={}/none"], "img2dataset.folder: there is no folder .*/none"),
        ("shards", ["shards={}/none.tar"], "shards.shards: shard .*/none.tar does not exist"),
        ("karpathy", ["file={}/x", "images={}"], "karpathy.file: .*/x does not exist"),
        ("visual_genome", ["file={}/x", "images={}"], "visual_genome.file: .*/x does not exist"),
        ("arrow", ["files={}/x.arrow"], "arrow.files: .*/x.arrow does not exist"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, kind: str, words: list[str], line: str) -> None:
    source = open_raw(kind, [word.replace("{}", str(tmp_path)) for word in words])
    with pytest.raises(UserError, match=line):
        list(source.items())


def test_a_broken_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"image": ')
    with pytest.raises(UserError, match=r"/a.json is no JSON: .*line 1"):
        list(open_raw("albef_json", [f"files={tmp_path}/a.json"]).items())


def test_another_shape_is_told_by_what_is_there() -> None:
    with pytest.raises(UserError, match=r"x.json: entry 3 has no 'image'; it has url, text$"):
        field_of({"url": 1, "text": 2}, "image", "x.json: entry 3")
    with pytest.raises(UserError, match=r"x: 'image' is null; wanted is a text"):
        field_of({"image": None}, "image", "x", str)
    with pytest.raises(UserError, match=r"x is a list; an object with 'image' is wanted"):
        field_of([], "image", "x")


def test_a_file_is_one_item_with_all_its_captions() -> None:
    items = [Item("a", "1", ("x",)), Item("b", "2", ("y",)), Item("c", "1", ("z", "x"))]
    assert list(grouped(items)) == [Item("a", "1", ("x", "z", "x")), Item("b", "2", ("y",))]


def test_a_key_is_the_end_of_a_path() -> None:
    assert key_of("/long/way/train2014/COCO_1.jpg") == "train2014_COCO_1"
    assert key_of("7.tar.png") == "7.tar"
