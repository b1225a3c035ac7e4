"""Tables of image files and captions."""

import json
from pathlib import Path

import pytest
from data.raw_files import jpeg, pairs, read_source, write_images

from elip_ds.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path, "a.jpg", "sub/b.jpg")
    return tmp_path


def test_a_csv_may_quote(folder: Path) -> None:
    (folder / "x.csv").write_text('title,filepath,n\n"one, ""a""\nline",a.jpg,1\nb,sub/b.jpg,2\n')
    words = (f"files={folder}/x.csv", "image=filepath", "caption=title")
    records = read_source("table", *words)
    assert pairs(records) == [("a", ('one, "a"\nline',)), ("sub_b", ("b",))]
    assert [record.image for record in records] == [jpeg(0), jpeg(1)]
    assert records[1].meta == {"n": "2"}


def test_a_tsv_quotes_nothing_and_may_have_no_names(folder: Path) -> None:
    (folder / "cc.tsv").write_text('a "cat\ta.jpg\n"b\tsub/b.jpg\textra\n')
    words = (f"files={folder}/cc.tsv", "columns=[caption,image]")
    assert pairs(read_source("table", *words)) == [("a", ('a "cat',)), ("sub_b", ('"b',))]


def test_lines_of_json_may_list_captions_and_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    rows = [{"image": "a.jpg", "caption": ["x", "y"]}, {"image": "a.jpg", "caption": "z"}]
    other = tmp_path / "tables"
    other.mkdir()
    (other / "t.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    words = (f"files={other}/t.jsonl", f"images={folder}")
    assert pairs(read_source("table", *words)) == [("a", ("x", "y", "z"))]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("t.csv", "path,caption\na.jpg,x\n", "t.csv: line 2 has no 'image'; it has path, caption"),
        ("t.csv", 'image,caption\na.jpg,"x\n', "t.csv: behind line 1: unexpected end of data"),
        ("t.jsonl", '{"image": "a.jpg"}\n', "t.jsonl: line 1 has no 'caption'; it has image"),
        ("t.jsonl", "\nx", "t.jsonl: line 2 is no JSON: "),
        ("t.xlsx", "", "t.xlsx ends in none of .csv, .tsv, .txt, .jsonl"),
    ],
)
def test_a_table_of_another_form_says_where(
    tmp_path: Path, name: str, text: str, line: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=line):
        read_source("table", f"files={tmp_path}/{name}")


def test_a_row_that_is_too_short_has_an_empty_caption(folder: Path) -> None:
    (folder / "x.csv").write_text("image,caption\na.jpg\n")
    assert pairs(read_source("table", f"files={folder}/x.csv")) == [("a", ("",))]
