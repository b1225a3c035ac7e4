"""Sheets of samples to look at."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from data.made_shards import record, write_tar
from data.raw_files import jpeg
from PIL import Image

from elip_ds.data.contact_sheet import SIDE, draw_samples, html_sheet, png_sheet, write_sheet
from elip_ds.data.record import Record
from elip_ds.data.shards import write_shards
from elip_ds.errors import UserError


def test_samples_are_drawn_over_all_shards_by_a_seed(tmp_path: Path) -> None:
    paths = write_shards(map(record, range(30)), tmp_path, "x", per_shard=4)
    drawn = draw_samples(paths, 12, seed=1)
    keys = [r.key for r in drawn]
    assert len(set(keys)) == 12 and keys == sorted(keys)
    assert len({int(key[1:]) // 4 for key in keys}) > 3
    assert draw_samples(paths, 12, seed=1) == drawn != draw_samples(paths, 12, seed=2)
    assert len(draw_samples(paths, 99)) == 30


def test_what_cannot_be_shown_is_left_out(tmp_path: Path) -> None:
    members = [("a.jpg", b"no image"), ("a.txt", b"a"), ("b.jpg", jpeg(0)), ("b.txt", b"b")]
    path = write_tar(tmp_path / "x.tar", [*members, ("c.jpg", jpeg(1))])
    assert [r.key for r in draw_samples([path], 9)] == ["b"]
    (tmp_path / "z.tar").write_bytes(b"no tar")
    assert len(draw_samples([tmp_path / "z.tar", path], 9)) == 1
    with pytest.raises(UserError, match="--sheet: none of 1 samples"):
        draw_samples([write_tar(tmp_path / "y.tar", members[:2])], 9)


def test_a_page_holds_pictures_and_captions_and_needs_nothing() -> None:
    page = html_sheet([Record("k<1>", jpeg(0, (500, 300)), "jpg", ("a < b & c", "second"))], "<t>")
    assert "k&lt;1&gt;" in page and "a &lt; b &amp; c" in page and "<h1>&lt;t&gt;</h1>" in page
    (data,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (SIDE, round(SIDE * 0.6))
    assert "http" not in page


def test_many_captions_are_cut() -> None:
    captions = tuple(f"region {i}." for i in range(50))
    page = html_sheet([Record("k", jpeg(0), "jpg", captions)], "t")
    assert page.count("region") == 5 and "... and 45 more" in page


def test_a_picture_has_a_cell_for_each_sample() -> None:
    red = io.BytesIO()
    Image.new("RGB", (300, 300), "red").save(red, "PNG")
    records = [Record(f"k{i}", red.getvalue(), "png", ("a caption",)) for i in range(7)]
    pixels = np.asarray(png_sheet(records)).astype(int)
    is_red = (pixels == (255, 0, 0)).all(-1)
    assert is_red.sum() == 7 * SIDE * SIDE
    assert (pixels.sum(-1) < 300).any()  # the text


@pytest.mark.parametrize("name", ["x.html", "x.png"])
def test_it_is_written_by_its_name(tmp_path: Path, name: str) -> None:
    write_sheet([record(0)], tmp_path / name, "t")
    assert (tmp_path / name).stat().st_size > 500
    with pytest.raises(UserError, match=r"--sheet .*: No such file or directory"):
        write_sheet([record(0)], tmp_path / "none" / name, "t")
    with pytest.raises(UserError, match=r"x.gif: a name that ends in .html or .png"):
        write_sheet([record(0)], tmp_path / "x.gif", "t")
