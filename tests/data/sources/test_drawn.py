"""The built-in scenes as a raw source."""

import pytest

from elip_ds.data.raw import open_raw
from elip_ds.data.sources.synthetic import scenes
from elip_ds.errors import UserError


@pytest.mark.parametrize("split", ["train", "val"])
def test_scenes_are_those_of_the_built_in_source_in_any_order(split: str) -> None:
    source = open_raw("scenes", [f"split={split}", "count=6", "image_size=48"])
    items = list(source.items())
    expected = list(scenes(split, 6, image_size=48))
    for order in (range(6), (4, 5, 1)):
        assert [source.read(items[i]) for i in order] == [expected[i] for i in order]


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("split=test", "scenes: unknown split 'test'"),
        ("image_size=8", "scenes: image_size=8 is too small; at least 48"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(word: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        open_raw("scenes", [word])
