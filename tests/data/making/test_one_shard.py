"""One shard and what is said of it."""

from pathlib import Path

import pytest

from elip_ds.data.making.one_shard import (
    Statistics,
    checksum,
    reason_of,
    with_captions,
    write_whole,
)
from elip_ds.data.record import BadSample, Record


def test_captions_lose_white_space_and_the_empty_ones() -> None:
    captions = (" a cat\n", "", " \t", "half a pair \ud800")
    cleaned = with_captions(Record("k", b"", "jpg", captions))
    assert cleaned.captions == ("a cat", "half a pair ?")
    with pytest.raises(BadSample, match=r"^no caption$"):
        with_captions(Record("k", b"", "jpg", ("", " ")))


def test_statistics_are_means_over_images_and_captions() -> None:
    statistics = Statistics()
    for size, captions in (((10, 20), ("a b c",)), ((30, 21), ("a", "a b"))):
        meta = {"width": size[0], "height": size[1]}
        statistics.add(Record("k", b"", "jpg", captions, meta))
    assert statistics.entry == {
        "samples": 2,
        "captions": 3,
        "mean_width": 20.0,
        "mean_height": 20.5,
        "mean_caption_words": 2.0,
    }


def test_a_checksum_is_that_of_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(3 * 2**20))
    before = checksum(path)
    assert before.startswith("blake2b:") and len(before) == 8 + 32
    path.write_bytes(bytes(3 * 2**20 - 1) + b"\1")
    assert checksum(path) != before


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_reasons_are_counted_without_what_is_particular() -> None:
    assert reason_of({"reason": "cannot be decoded: 7 bytes short"}) == "cannot be decoded"
