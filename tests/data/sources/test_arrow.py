"""METER's Arrow tables."""

import sys
from pathlib import Path
from typing import Any

import pytest
from data.raw_files import jpeg, pairs, read_source

from elip_ds.data.raw import open_raw
from elip_ds.data.record import BadSample
from elip_ds.errors import UserError

pyarrow = pytest.importorskip("pyarrow")


def write_arrow(path: Path, columns: dict[str, list[Any]]) -> Path:
    """As METER's make_arrow writes it: one file, record batches of the table."""
    table = pyarrow.table(columns)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as out:
        out.write_table(table, max_chunksize=2)
    return path


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    columns = {
        "image": [jpeg(i) for i in range(3)],
        "caption": [["a", "b"], ["c"], ["d"]],
        "image_id": ["COCO_1.jpg", "COCO_2.jpg", "COCO_3.jpg"],
        "split": ["train", "restval", "test"],
    }
    return write_arrow(tmp_path / "coco.arrow", columns)


def test_rows_are_samples(coco: Path) -> None:
    records = read_source("arrow", f"files={coco}")
    assert pairs(records) == [("COCO_1", ("a", "b")), ("COCO_2", ("c",)), ("COCO_3", ("d",))]
    assert [record.image for record in records] == [jpeg(i) for i in range(3)]
    assert records[0].meta == {"split": "train"}


def test_splits_are_chosen(coco: Path) -> None:
    assert len(read_source("arrow", f"files={coco}", "splits=[train,restval]")) == 2
    with pytest.raises(UserError, match=r"no row is of split dev; there are restval, test, train"):
        read_source("arrow", f"files={coco}", "splits=dev")


def test_a_table_of_image_and_caption_will_do(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "sbu_0.arrow", {"image": [jpeg(0), None], "caption": ["x", "y"]})
    source = open_raw("arrow", [f"files={path}"])
    first, second = source.items()
    assert (first.key, source.read(first).captions) == ("sbu_0_0000000", ("x",))
    with pytest.raises(BadSample, match=r"no image"):
        source.read(second)


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "x.arrow", {"image": [b""], "text": ["x"]})
    with pytest.raises(UserError, match=r"x.arrow has no column 'caption'; it has image, text"):
        read_source("arrow", f"files={path}")
    path.write_bytes(b"none of it")
    with pytest.raises(UserError, match=r"x.arrow is no Arrow file"):
        read_source("arrow", f"files={path}")


def test_without_pyarrow_it_says_how_to_get_it(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        UserError, match=r"kind arrow needs pyarrow: pip install 'elip_ds\[arrow\]'"
    ):
        read_source("arrow", f"files={coco}")
